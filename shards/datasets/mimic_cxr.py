"""MIMIC-CXR: 377,110 chest radiographs of 227,835 studies as DICOM, with reports.

    --raw mimic-cxr/2.1.0/
      cxr-record-list.csv.gz             subject_id,study_id,dicom_id,path
      mimic-cxr-reports.zip              as it is, or unpacked here: files/p10/p10000032/s50414267.txt
      files/p10/p10000032/s50414267/02aa804e-bde0afdd-112c0b34-7bc16630-4e384014.dcm

The official split, projections and labels are tables of MIMIC-CXR-JPG: put mimic-cxr-2.0.0-split.csv and its kin beside
the record list, or give split=FILE. Johnson et al., 2019, https://doi.org/10.1038/s41597-019-0322-0.
"""

from collections.abc import Iterator
from pathlib import Path

from shards.datasets import reader
from shards.datasets.helpers import mimic
from shards.datasets.reader import RawStudy

SYNTHETIC = False
EDITION = mimic.Edition(images="records", names=("cxr-record-list.csv",), suffix=".dcm", complete=False)


class MimicCxrOptions(mimic.MimicOptions):
    """mimic_cxr: chest radiographs in DICOM with reports."""


OPTIONS = MimicCxrOptions


def read(raw: Path | None, options: reader.ReaderOptions) -> Iterator[RawStudy]:
    """Yield the studies. Raises UserError where a table, the images or the reports are not found."""
    assert isinstance(options, MimicCxrOptions)
    return mimic.read_edition(raw, options, EDITION)
