"""Tables of the files that the commands of the package write: a report and a profile."""

from __future__ import annotations

from pathlib import Path

from harness import markdown

from teamnet_pl.cooperation.report import REPORT_HEADER, Report, report_lines
from teamnet_pl.deploy.runtime.profile import Profile
from teamnet_pl.deploy.runtime.profile_report import HEADER as PROFILE_HEADER
from teamnet_pl.deploy.runtime.profile_report import profile_lines


def report_table(path: Path) -> str:
    """Tabulates a ``per_depth.json`` of `teamnet fit` or `teamnet test`."""
    return markdown(REPORT_HEADER, report_lines(Report.load(path)))


def profile_table(path: Path) -> str:
    """Tabulates a file of `teamnet profile`."""
    profile = Profile.load(path)
    return f"{markdown(PROFILE_HEADER, profile_lines(profile))}\n\n{profile.machine}"
