"""What a run says of itself."""

from __future__ import annotations

import autodiff as ad
from problems import known


def test_report_tells_what_was_run() -> None:
    case, _ = known("mlp")
    curvature = ad.per_sample(ad.hessian(case.loss()), (None, 0, 0), memory="64MiB")
    assert "per_sample(hessian(" in repr(curvature)
    assert curvature.report is None
    curvature(case.params, case.inputs, case.targets)
    report = curvature.report
    assert (report.samples, report.smallest, report.largest, report.chunks) == (5, 1, 4, 2)
    assert 0 < report.peak < 2**20
    assert "5 samples in 2 chunks of 1 to 4; peak " in repr(curvature)
    assert "of 64.0 MiB" in repr(curvature)
    # What was learnt serves the next call.
    curvature(case.params, case.inputs, case.targets)
    assert curvature.report.chunks == 1
