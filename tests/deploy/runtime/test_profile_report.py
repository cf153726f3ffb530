from teamnet_pl.deploy.runtime.profile import Profile, ProfileRow
from teamnet_pl.deploy.runtime.profile_report import draw_profile, pareto_front, profile_lines
from tests.helpers.deploy import profile_row


def test_pareto_front():
    points = {"d9": (9, 0.8), "d7": (7, 0.9), "d5": (5, 0.7), "d4": (4, 0.7), "d3": (4, 0.6)}
    rows = [profile_row(name, 1, *point) for name, point in points.items()]
    assert [row.depth for row in pareto_front(rows)] == ["d4", "d7"]


def test_lines_of_the_table():
    rows = [ProfileRow("d2", [2, 0], 1_234_567, 9, 8, 1.234, 5.678, 2**20, 0.98765)]
    (line,) = profile_lines(Profile("cpu", "a machine", 1, rows))
    assert line == ("d2", "2-0", "1.235", "8", "1.23", "5.68", "1.00", "98.77%")
    (line,) = profile_lines(Profile("cpu", "a machine", 1, [profile_row()]))
    assert line[-1] == ""


def test_the_picture_marks_the_pareto_front():
    rows = [profile_row("d2", n, 3.0 * n, 0.9) for n in (1, 8)] + [
        profile_row("d1", n, 4.0 * n, 0.8) for n in (1, 8)
    ]
    figure = draw_profile(Profile("cpu", "a machine", 1, rows, "test"))
    assert [axes.get_title() for axes in figure.axes] == ["batch of 1", "batch of 8"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[1].lines}
    assert lines["Pareto front"] == [[24, 90]]
    assert {text.get_text() for text in figure.axes[0].texts} == {"d1", "d2"}
