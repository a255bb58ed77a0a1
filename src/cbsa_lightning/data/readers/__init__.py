"""Readers, which convert annotation files to an ``AnnotationTable``. Each format has its own module."""

from cbsa_lightning.data.readers.cloud_jsonl import CloudLines
from cbsa_lightning.data.readers.coco import COCO
from cbsa_lightning.data.readers.cvat import CVAT
from cbsa_lightning.data.readers.digits import Digits
from cbsa_lightning.data.readers.fiftyone import FiftyOne
from cbsa_lightning.data.readers.label_studio import LabelStudio
from cbsa_lightning.data.readers.nuswide import NUSWIDE
from cbsa_lightning.data.readers.open_images import OpenImages
from cbsa_lightning.data.readers.source import Source
from cbsa_lightning.data.readers.table import Table
from cbsa_lightning.data.readers.voc import VOC

__all__ = [
    "COCO",
    "CVAT",
    "NUSWIDE",
    "VOC",
    "CloudLines",
    "Digits",
    "FiftyOne",
    "LabelStudio",
    "OpenImages",
    "Source",
    "Table",
]
