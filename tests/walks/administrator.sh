# An administrator's afternoon: a server and a site are made, checked, backed up and restored; what
# is wrong is one line with its cure; then a whole federation on this machine.

expect() { # CODE WORD COMMAND...: the command ends so, and says the word
    local code=$1 word=$2 found=0
    shift 2
    script -qec "$(printf '%q ' "$@")" said || found=$? # on a terminal, as a user sees it
    test "$found" -eq "$code"
    grep -q -- "$word" said
}

start_server() { # in the background; returns when it listens
    deal server start one/server > server.log 2>&1 &
    until (: < "/dev/tcp/localhost/$PORT") 2> /dev/null; do sleep 1; echo -n .; done
}

echo "== server"
PORT=$(python -c "from simulations.engines.flower import free_port; print(free_port())")
deal server init one/server --host localhost --superlink-port "$PORT"
expect 2 "one/server" deal server init one/server --host localhost
echo "== site"
mkdir -p rows/triage
rows() { # FROM TO
    echo "text,label"
    for n in $(seq "$1" "$2"); do
        echo "sudden pain in the chest for $n hours,urgent"
        echo "prescription number $n to renew,routine"
    done
}
rows 1 20 > rows/triage/train.csv
rows 21 40 > rows/triage/test.csv
deal site init one/north --name north --data rows --server "localhost:$PORT" \
    --certificate one/server/ca.crt
expect 2 "deal server start" deal server add-site north one/north/site.pub --dir one/server
echo "== started"
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
start_server
deal server add-site north one/north/site.pub --dir one/server
expect 2 "north" deal server add-site north one/north/site.pub --dir one/server
expect 2 "runs already" deal server start one/server
expect 2 "data.labels" deal site check one/north
expect 0 "no run yet" deal status --dir one/server
echo "== backup"
deal server backup saved/server --dir one/server
deal site backup saved/north one/north
echo "== killed"
kill -9 "$!"
wait "$!" || true
rm -r one/server one/north
cp -r saved/server one/server
cp -r saved/north one/north
echo "== restored"
start_server
expect 2 "north" deal server add-site north one/north/site.pub --dir one/server
kill "$!"
wait "$!" || true
echo "== demo"
deal demo --dir demo
expect 2 "no ledger" deal ledger verify one/north/state
