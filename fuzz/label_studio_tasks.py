"""Tasks of a Label Studio project that predictions are written for."""

from __future__ import annotations

import posixpath
from pathlib import Path

import numpy as np

from cbsa_lightning.inference.labels.image_labels import ImageLabels
from cbsa_lightning.inference.labels.project_tasks import Project, predictions_for_tasks
from fuzz.harness import Case, Silence, Target
from fuzz.label_studio import CONFIG, place, tasks
from fuzz.mutations import Rng, as_json, damage_tree
from fuzz.plain_reading import damaged_xml, plain_json

GIVEN = {"a.jpg": ["cat", "oak"], "b/c.jpg": [], "p/q.jpg": ["dog"], "elsewhere.jpg": ["cat"]}


def labels() -> ImageLabels:
    """Labels of images, some of which the tasks are of."""
    names = ("cat", "dog", "oak")
    given = np.array([[name in found for name in names] for found in GIVEN.values()])
    images = np.array(list(GIVEN), np.dtypes.StringDType())
    return ImageLabels(images, names, given.astype(np.float32), given, np.zeros_like(given))


class LabelStudioTasks(Target):
    """``predictions_for_tasks`` of damaged exports and configurations."""

    name, share = "Label Studio tasks", 4

    def __init__(self) -> None:
        super().__init__()
        self.base = {"c.xml": CONFIG.encode()}

    def draw(self, rng: Rng) -> Case:
        """A tree that is damaged, with the configuration, a damaged one, or none."""
        tree = tasks()
        files = {"t.json": as_json(rng, damage_tree(rng, tree) if rng.random() < 0.8 else tree)}
        draw = rng.random()
        if draw < 0.2:
            files["c.xml"] = damaged_xml(rng, CONFIG).encode("utf-8", "surrogatepass")
        return Case(files, {"label_config": "c.xml"} if draw < 0.7 else {}, ("t.json", "c.xml"))

    def run(self, case: Case, folder: Path) -> None:
        """Each task of an image gets what the labels give this image, and no other task gets anything."""
        config = folder / case.options["label_config"] if case.options else None
        project = Project(folder / "t.json", config, "labels", folder, "photos")
        made, _ = predictions_for_tasks(labels(), project, "v")
        expected = {}
        for task in plain_json((folder / "t.json").read_text(encoding="utf-8-sig")):
            path = task["data"].get("path") or place(task["data"]["image"])
            path = posixpath.normpath(path.replace("\\", "/"))
            if path in GIVEN:
                expected[task["id"]] = GIVEN[path]
        found = {
            body["task"]: [name for result in body["result"] for name in result["value"]["choices"]] for body in made
        }
        if found != expected or len(made) != len(found):
            raise Silence(f"predictions {found} instead of {expected}")
        if wrong := [result for body in made for result in body["result"] if result["from_name"] != "labels"]:
            raise Silence(f"another control: {wrong}")
