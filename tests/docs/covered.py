"""How each command of the pages is tested.

A command is in one of these tables, or in docs/tutorial.md (``test_tutorial.py`` runs that page).
The command line of every ``deal`` is read by the real one as well, with names and settings.
"""

from __future__ import annotations

FAST = {
    "deal ls": "deal simulate quickstart",
    "deal check my.toml": "nothing is wrong",
    "deal check my.toml --set data.split=0.2 --strict": "nothing is wrong",
    "deal check private": "nothing is wrong",
    "deal report runs/quickstart-seed0": "runs/quickstart-seed0/report.html",
    "deal report runs/quickstart-seed0 --labels": "runs/quickstart-seed0/labels.json",
    "deal report /srv/deal/runs/RUN": "runs/mine/report.html",
    "deal compare runs/quickstart-seed0 runs/mine": "compare.html",
    "deal compare runs/one runs/two": "compare.html",
    "deal predict runs/quickstart-seed0 'a question'": '"text": "a question"',
    "deal predict runs/quickstart-seed0 'Which drug reverses heparin?'": '"label":',
    "deal predict runs/quickstart-seed0 --file texts.csv --column question --task surgery": (
        '"row": 2'
    ),
    "deal predict /srv/deal-site/state/runs/RUN/adapter 'a text'": '"text": "a text"',
    "deal export runs/quickstart-seed0 --to mine": "mine/adapter_config.json",
    "deal export runs/quickstart-seed0 --to mine --merge": "mine/model.safetensors",
    "deal ledger show STATE": "epsilon",
    "deal ledger show /srv/deal-site/state": "epsilon",
    "deal ledger export STATE --out c.json": "c.json",
    "deal ledger verify STATE --certificate c.json": "certificate",
    "deal report --privacy STATE": "STATE/privacy.html",
    "deal report --privacy /srv/deal-site/state --out privacy-record.html": "privacy-record.html",
    "deal server init /srv/deal --host federation.example.org --host 192.0.2.7": "server/ca.crt",
    "deal site init /srv/deal-site --name north --data /srv/data "
    "--server federation.example.org:9443 --certificate ca.crt --experiment two-tasks.toml": (
        "site/site.toml"
    ),
    "deal data import-cl-benchmark CL_Benchmark --out tasks": "tasks",
}
"""Command to what it says, or the file that it leaves: run in a prepared folder."""

STREAM = "--set data.max_train=24 --set data.max_test=8 --set federation.rounds=1"
ALONE = "--set run.threads=1 --set run.workers=1"
SMALL = f"""{STREAM} {ALONE} --set data.tasks=["laboratory","surgery"]"""
AUDIT = f"{SMALL} --canaries 40 --repetitions 1 --epsilon 8"

SLOW = {
    "deal simulate quickstart": SMALL,
    "deal simulate quickstart --set method.name=lwf --seed 1": SMALL,
    "deal simulate quickstart --set privacy.mechanism=record --set privacy.target_epsilon=8": SMALL,
    "deal simulate private": SMALL,
    "deal simulate quickstart-llm": f"{STREAM} {ALONE}",
    "deal simulate my.toml --out runs/mine --resume": "",
    "deal simulate my.toml --set privacy.mechanism=record --set privacy.unit_column=patient_id": "",
    "deal study medmcqa --only 'deal.*,lwf.*'": f"{SMALL} --seeds 0 --jobs 1",
    "deal study private --epsilon 1,8,inf": f"{SMALL} --seeds 0 --epsilon 8 --jobs 1",
    "deal audit private-site --epsilon 8": AUDIT,
    "deal audit private --set federation.rounds=2": AUDIT,
}
"""Command to what makes it small: run one after another in one folder, marked slow."""

ONE_MACHINE = (
    "tests/docs/test_one_machine.py",
    "test_what_the_page_makes_is_ready_and_names_the_port_that_listens",
)
SITE_OPTIONS = (
    "--server localhost:9444 --certificate one/server/ca.crt --experiment one/triage.toml"
)

ELSEWHERE = {
    "mkdir -p one/data/north/triage": ONE_MACHINE,
    "cat '>' one/data/north/triage/train.csv": ONE_MACHINE,
    "cat '>' one/data/north/triage/test.csv": ONE_MACHINE,
    "cp -r one/data/north one/data/south": ONE_MACHINE,
    "cat '>' one/triage.toml": ONE_MACHINE,
    "deal server init one/server --host localhost": ONE_MACHINE,
    f"deal site init one/north --name north --data one/data/north {SITE_OPTIONS}": ONE_MACHINE,
    f"deal site init one/south --name south --data one/data/south {SITE_OPTIONS}": ONE_MACHINE,
    "deal site check one/north --experiment one/triage.toml": ONE_MACHINE,
    "deal site check one/south --experiment one/triage.toml": ONE_MACHINE,
    "deal demo deployment": (
        "tests/simulations/deployment/demo/test_deployment_demo.py",
        "test_three_times_in_a_row_and_all_processes_are_gone_after_each",
    ),
    "deal simulate quickstart --set run.track=tensorboard": (
        "tests/server/test_tracking.py",
        "test_it_holds_what_a_resumed_run_has_found_and_calls_nobody",
    ),
    "deal simulate quickstart --set method.name=fedprox": (
        "tests/test_extending.py",
        "test_a_method",
    ),
}
"""Command to the file and the test that run it."""

DEPLOYMENT = "needs a server and sites that run; tests/simulations/deployment runs them"
HOURS = "takes hours; the same command runs with fewer runs"
BENCHMARK = "needs a public benchmark that is not in the repository"
INSTALL = "needs a package index"

PARSED = {
    "deal server start one/server": DEPLOYMENT,
    "deal server add-site north one/north/site.pub --dir one/server": DEPLOYMENT,
    "deal server add-site south one/south/site.pub --dir one/server": DEPLOYMENT,
    "deal site start one/north": DEPLOYMENT,
    "deal site start one/south": DEPLOYMENT,
    "deal submit one/triage.toml --dir one/server": DEPLOYMENT,
    "deal status --dir one/server": DEPLOYMENT,
    "deal predict one/north/state/runs/RUN/adapter 'sudden pain in the chest'": DEPLOYMENT,
    "deal site check /srv/deal-site --experiment two-tasks.toml": DEPLOYMENT,
    "deal submit two-tasks.toml --dir /srv/deal": DEPLOYMENT,
    "deal submit --resume RUN --dir /srv/deal": DEPLOYMENT,
    "deal status --dir /srv/deal": DEPLOYMENT,
    "deal stop RUN --dir /srv/deal": DEPLOYMENT,
    "deal study medmcqa": HOURS,
    "deal study private --epsilon 1,2,4,8,inf": HOURS,
    "deal study private --epsilon 1,2,4,8,inf --seeds 0,1,2": HOURS,
    "deal audit private-site": HOURS,
    "deal audit quickstart --membership": HOURS,
    "deal study clinc10 --set data.path=FOLDER": BENCHMARK,
    "deal simulate cl-order1 --set data.path=tasks": BENCHMARK,
    "deal data import-cl-benchmark LLM-CL-Benchmark_500 --format trace --out trace-tasks": (
        BENCHMARK
    ),
    "deal simulate trace --set data.path=trace-tasks": BENCHMARK,
    "deal export runs/quickstart-seed0 --to mine --push OWNER/NAME": (
        "needs an account of the hub; tests/simulations/use/test_export.py sends it to a local one"
    ),
    "flwr run simulations/bundle --stream": (
        "starts Flower's own SuperLink; tests/simulations/engines/test_flower.py runs the app"
    ),
}
"""Command to why its command line alone is read, by the real ``deal`` or ``flwr``."""

NOT_OURS = {
    "source .venv/bin/activate": "no program",
    "git clone REPOSITORY": "needs a network",
    "cd federated-deal": "no program",
    "python3.11 -m venv .venv": "Python's own",
    "python3 -m venv .venv": "Python's own",
    ".venv/bin/pip install --require-hashes -r requirements.lock": INSTALL,
    ".venv/bin/pip install --no-deps --no-build-isolation --editable .": INSTALL,
    ".venv/bin/pip install --no-deps --require-hashes -r requirements-assets.txt": INSTALL,
    ".venv/bin/pip install torch --index-url ADDRESS": INSTALL,
    ".venv/bin/pip install --editable .": INSTALL,
    "pip install --editable '.[tensorboard]'": INSTALL,
    "make quickstart": "tests/simulations/run/test_quickstart.py runs it",
    "make test": "runs this test",
    "make test-slow": "runs this test",
    "make docs": "tests/docs/test_site.py does the same",
}
"""Command of another program to why it is not run; targets and files that it names are there."""
