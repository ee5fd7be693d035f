# A researcher's table: methods and seeds in one study, what a stop leaves and a second call goes on
# with, and the files that go into a paper.

cat > study.toml <<'END'
description = "Two methods, two seeds"
experiment = "quickstart"
seeds = [0, 1]
candidate = "deal"
baseline = "sequential"
[set]
data.tasks = ["laboratory", "head-and-neck"]
data.max_train = 80
data.max_test = 40
federation.rounds = 1
[arms.sequential]
set.method.name = "sequential"
[arms.deal]
label = "DEAL"
END

echo "== begun"
deal study study.toml --only sequential --out study
echo "== gone on with"
deal study study.toml --out study
test -s study/study.json
echo "== tables"
ls study/paper
grep -q toprule study/paper/*.tex
test -n "$(ls study/paper/*.csv study/paper/*.svg study/paper/*.pdf)"
echo "== budgets"
deal study private-sums --epsilon 1,8 --seeds 0,1 --out budgets \
    --set 'data.tasks=["laboratory"]' --set data.max_train=80 --set data.max_test=40
grep -q delta budgets/study.json
