"""Sites that pin each other's keys, as a secure sum among them needs."""

from __future__ import annotations

from collections.abc import Collection

from simulations.deployment.keys import fingerprint_of_line, read_public_key
from tests.simulations.deployment.loopback import Federation, done


def pin_each_other(fed: Federation, names: Collection[str]) -> None:
    """As if each institution had read out its fingerprint, which the server shows as well."""
    shown = {
        name: fingerprint_of_line(read_public_key(fed.site(name) / "site.pub")) for name in names
    }
    for name in names:
        others = "".join(f'{peer} = "{shown[peer]}"\n' for peer in names if peer != name)
        path = fed.site(name) / "site.toml"
        text = path.read_text().replace("[policy]", f"[peers]\n{others}\n[policy]", 1)
        path.write_text(text)
        checked = done("site", "check", str(fed.site(name)), "--offline")
        assert f"read out by telephone: {shown[name]}" in checked
        assert "secure sums: required by the policy, with" in checked
