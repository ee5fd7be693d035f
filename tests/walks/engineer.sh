# An engineer's first hour: rows in a workbook, with empty rows and a column that names the site; to a
# report, predictions, a comparison, and a method of one's own from one file.

echo "== rows"
python - <<'END'
from itertools import product
from pathlib import Path

import pandas as pd

ORGANS = {
    "cardiology": ["heart", "aorta", "pulse", "atrium", "valve", "artery"],
    "neurology": ["brain", "nerve", "seizure", "migraine", "spinal cord", "stroke"],
    "dermatology": ["skin", "rash", "mole", "eczema", "scalp", "blister"],
    "ophthalmology": ["eye", "retina", "lens", "cornea", "glaucoma", "eyelid"],
}
ASKED = ["What treats the {}?", "Which test shows the {}?", "Who should see a patient with the {}?"]
PATIENTS = ["a child", "a man of 70", "a pregnant woman", "an athlete"]
SITES = ["München", "Graz", "Lyon", "Bologna"]
for task, clinics in {"wards": ["cardiology", "neurology"], "rooms": ["dermatology", "ophthalmology"]}.items():
    rows = [
        (f"{form.format(word)} {who}", clinic)
        for clinic in clinics
        for word, form, who in product(ORGANS[clinic], ASKED, PATIENTS)
    ]
    table = pd.DataFrame(rows, columns=["question", "clinic"])
    table["site"] = [SITES[(5 * n) % 4] for n in range(len(table))]
    table.loc[3, "question"] = None
    table.loc[7, "clinic"] = None
    Path("data", task).mkdir(parents=True)
    table.to_excel(Path("data", task, "train.xlsx"), index=False)
table[["question", "clinic"]].dropna().head(40).to_csv("new.csv", index=False)
END
cat > my.toml <<'END'
[data]
source = "files"
path = "data"
split = 0.25
tasks = ["wards", "rooms"]
text_column = "question"
label_column = "clinic"
[data.partition]
kind = "column"
column = "site"
[federation]
clients = 4
rounds = 2
END

echo "== check"
deal check my.toml
echo "== train"
deal simulate my.toml --out runs/mine
echo "== report"
deal report runs/mine --labels
echo "== predict"
deal predict runs/mine --file new.csv --label-column clinic > answers.jsonl
test "$(wc -l < answers.jsonl)" -eq 40
echo "== compare"
deal simulate my.toml --set method.name=sequential --out runs/sequential
deal compare runs/mine runs/sequential

echo "== a method of one's own"
cat > my_method.py <<'END'
from deal_core.baselines.sequential import Sequential
from deal_core.methods import METHODS


class Patient(Sequential):
    """One adapter for all tasks; says when one begins."""

    def begin_task(self, state, generator, tasks=()):
        print("a new task:", *tasks)
        return super().begin_task(state, generator, tasks)


METHODS["patient"] = lambda method, adapter: Patient(adapter)
END
sed 's/^\[data\]/plugins = ["my_method.py"]\nmethod.name = "patient"\n[data]/' my.toml > own.toml
deal check own.toml
deal simulate own.toml --out runs/own
deal compare runs/mine runs/own
