"""Clients and a strategy of one's own as the apps of ``flwr run``, at sites with TLS and keys."""

import pytest

from client.site_file import read_site
from deal_core.privacy.ledger import Ledger
from server.folder import read_events
from server.results import read_results
from simulations.engines.flower import BUNDLE, CONNECTION, LOCAL, FlowerHome, free_port, program
from simulations.output import toml_value
from tests.architectures import save
from tests.simulations.deployment.loopback import (
    LABELS,
    SLOW,
    divide,
    experiment_file,
    federation,
    wait_for,
)

COMMON = """
import os
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from simulations.api import DealClient, DealStrategy, RecordDP

model = AutoModelForCausalLM.from_pretrained({model!r})
model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4))
tokenizer = AutoTokenizer.from_pretrained({model!r})
tasks = {labels!r}
"""
CLIENT = """
rows = {t: [(f"{a} b {k}", a) for k in range(30) for a in own] for t, own in tasks.items()}
rows = {t: (own[int(os.environ["SHARE"])::2], own[:6]) for t, own in rows.items()}
app = DealClient(model, tokenizer, rows, privacy=RecordDP(epsilon=4))
"""
SERVER = """
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    sites = {{"federation.sites": ["north", "south"]}}
    strategy = DealStrategy(model, tokenizer, tasks, clients=2, rounds=1, overrides=sites,
                            privacy=RecordDP(epsilon=8), out={out!r})
    strategy.start(grid)
"""


@pytest.mark.slow
@pytest.mark.timeout(900 * SLOW)
def test_own_objects_are_the_apps_of_a_deployment(tmp_path):
    """What a client demands holds, and each site's ledger is charged."""
    names, out = ("north", "south"), tmp_path / "own"
    common = COMMON.format(model=str(save(tmp_path / "llama", "llama")), labels=LABELS)
    app = tmp_path / "app"
    app.mkdir()
    (app / "client_app.py").write_text(common + CLIENT)
    (app / "server_app.py").write_text(common + SERVER.format(out=str(out)))
    plain = (BUNDLE / "pyproject.toml").read_text().replace('"deal_app.py"', '"*_app.py"')
    for side in ("client", "server"):
        plain = plain.replace(f'"deal_app:{side}_app"', f'"{side}_app:app"')
    (app / "pyproject.toml").write_text(plain)
    divide(tmp_path / "data", dict.fromkeys(names, ".csv"), train=4, test=2)
    experiment = experiment_file(tmp_path / "two-tasks.toml")
    with federation(tmp_path) as fed:
        for share, name in enumerate(names):
            fed.add(name, tmp_path / "data" / name, experiment, policy="")
            path = fed.site(name) / "site.toml"
            server = read_site(path).server
            fed.deal.program = [program("flower-supernode")]
            home = FlowerHome(fed.site(name) / "state" / "flower")
            fed.deal.environment |= {**home.environment(), "SHARE": str(share)}
            fed.deal.start(
                name,
                *("--root-certificates", server.certificate, "--superlink", server.address),
                *("--auth-supernode-private-key", server.key, "--host", LOCAL),
                *("--port", free_port(), "--node-config", f"site={toml_value(str(path))}"),
            )
        fed.folder.flower.ask("run", str(app), CONNECTION)
        ends = "run_finished", "run_stopped"
        wait_for(
            "end", lambda: {e["event"] for e in read_events(out / "metrics.jsonl")} & {*ends}, 600
        )
        results = read_results(out)
        assert results.tasks == list(LABELS)
        assert {*results.privacy.epsilon} == {"0", "1"}
        assert all(0 < spent <= 4 for spent in results.privacy.epsilon.values())
        for name in names:
            assert Ledger(fed.site(name) / "state").events()
