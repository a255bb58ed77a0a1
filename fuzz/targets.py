"""All kinds of input."""

from __future__ import annotations

from fuzz.annotations import CocoFile, NusWideFiles, VocFlags
from fuzz.check import Checks
from fuzz.checkpoints import Checkpoints
from fuzz.harness import Target
from fuzz.images import ImageBytes
from fuzz.label_studio import ImageLocations, LabelConfigs, LabelStudioJson, LabelStudioRows
from fuzz.label_studio_tasks import LabelStudioTasks
from fuzz.labeling_tools import CloudJsonLines, CvatXml, FiftyOneJson, OpenImagesCsv
from fuzz.names import ClassFiles, ClassNames
from fuzz.predict import PredictInputs
from fuzz.settings import Configs, DataSettings
from fuzz.splits import SplitFiles
from fuzz.tables import CsvTables, JsonLines, ParquetTables

_ALL: tuple[type[Target], ...] = (
    ImageBytes, CocoFile, VocFlags, NusWideFiles, CsvTables, ParquetTables, JsonLines, ClassFiles, ClassNames,
    SplitFiles, PredictInputs, DataSettings, Configs, Checkpoints, LabelStudioJson, LabelStudioRows, LabelConfigs,
    CvatXml, ImageLocations, LabelStudioTasks, FiftyOneJson, OpenImagesCsv, CloudJsonLines, Checks,
)  # fmt: skip
TARGETS = {target.name: target for target in _ALL}
