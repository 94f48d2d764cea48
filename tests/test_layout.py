"""Named tensors ↔ one vector ↔ ranges."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import RegistrationError
from headwater.messages import TensorSpec
from headwater.spec.layout import LINE, PAGE, Layout, describe, ranges

shapes = st.one_of(
    st.lists(st.integers(0, 40), max_size=3).map(tuple), st.sampled_from([(), (0,), (1,), (5000,), (16,)])
)
tensors = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.tuples(shapes, st.integers(0, 2)), min_size=1, max_size=12
).map(lambda found: [TensorSpec(name, *rest[:1], "float32", rest[1]) for name, rest in found.items()])


@st.composite
def layouts_and_carried(draw):
    layout = Layout(draw(tensors))
    size = len(layout.tensors)
    return layout, np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))


@given(tensors)
def test_tensors_lie_apart_each_on_a_line_ordered_by_group_and_name(specs):
    layout = Layout(specs)
    assert [(t.group, t.name) for t in layout.tensors] == sorted((t.group, t.name) for t in specs)
    assert (layout.starts % LINE == 0).all()
    assert (layout.stops - layout.starts == [math.prod(t.shape) for t in layout.tensors]).all()
    assert (layout.starts[1:] >= layout.stops[:-1]).all()
    assert (layout.starts[1:] - layout.stops[:-1] < LINE).all()
    assert layout.elements % PAGE == 0
    assert layout.stops[-1] <= layout.elements < layout.stops[-1] + PAGE + LINE
    assert layout.groups.tolist() == [t.group for t in layout.tensors]


@given(tensors, st.randoms(use_true_random=False))
def test_the_order_of_declaration_does_not_matter(specs, random):
    shuffled = random.sample(specs, len(specs))
    assert Layout(shuffled).tensors == Layout(specs).tensors
    assert Layout(shuffled).index == Layout(specs).index


@given(tensors)
def test_views_are_the_tensors_and_leave_the_gaps_alone(specs):
    layout = Layout(specs)
    vector = np.zeros(layout.elements, np.float32)
    views = layout.views(vector)
    for number, spec in enumerate(specs, start=1):
        assert views[spec.name].shape == spec.shape
        assert (views[spec.name] == 0).all()  # nobody else wrote there
        views[spec.name][...] = number
    assert np.count_nonzero(vector) == sum(math.prod(spec.shape) for spec in specs)


@given(st.integers(0, 50), st.integers(1, 9))
def test_ranges_are_pages_that_cover_and_differ_by_one_at_most(pages, servers):
    cut = ranges(pages * PAGE, servers)
    assert len(cut) == servers
    assert cut[0][0] == 0
    assert cut[-1][1] == pages * PAGE
    assert all(before[1] == after[0] for before, after in pairwise(cut))
    sizes = {(stop - start) / PAGE for start, stop in cut}
    assert sizes <= {pages // servers, pages // servers + 1}


@given(layouts_and_carried())
def test_a_mask_is_a_bit_a_tensor_and_unmask_its_inverse(drawn):
    layout, carried = drawn
    names = [tensor.name for tensor, is_carried in zip(layout.tensors, carried, strict=True) if is_carried]
    mask = layout.mask(names)
    assert len(mask) == -(-len(layout.tensors) // 8)
    assert (layout.unmask(mask) == carried).all()
    assert int.from_bytes(mask, "little") == sum(2 ** layout.index[name] for name in names)


@given(layouts_and_carried(), st.integers(1, 6), st.data())
def test_runs_cover_the_carried_elements_of_a_range_and_their_gaps_only(drawn, servers, data):
    layout, carried = drawn
    start, stop = data.draw(st.sampled_from(layout.cut(servers)))
    covered = np.zeros(layout.elements, bool)
    runs = layout.runs(carried, start, stop)
    for low, high in runs:
        assert start <= low < high <= stop
        assert not covered[low:high].any()
        covered[low:high] = True
    assert all(before[1] < after[0] for before, after in pairwise(runs))
    for i, is_carried in enumerate(carried):
        low, high = (min(max(int(x), start), stop) for x in (layout.starts[i], layout.stops[i]))
        assert (covered[low:high] == is_carried).all()


def test_a_lone_scalar_takes_a_page_and_an_empty_tensor_too():
    for shape in [(), (0,)]:
        layout = Layout([TensorSpec("x", shape, "float32")])
        assert layout.elements == PAGE
        assert layout.cut(3) == [(0, 0), (0, 0), (0, PAGE)]


@pytest.mark.parametrize(
    ("specs", "text"),
    [
        ([], "at least one tensor"),
        ([TensorSpec("x", (1,), "float32"), TensorSpec("x", (2,), "float32", 1)], "must differ"),
        ([TensorSpec("x", (2, -1), "float32")], "'x' has an impossible shape"),
        ([TensorSpec("x", (2,), "float32", -1)], "'x' has an impossible parameter group -1"),
        ([TensorSpec("x", (2,), "float32", 2**70)], "'x' has an impossible parameter group"),
        ([TensorSpec("x", (2,), "float64")], r"'x' is float64.*astype\('float32'\)"),
        ([TensorSpec("x", (2,), "int64")], "'x' has dtype int64, expected"),
        ([TensorSpec("x", (2**40, 2**40), "float32")], "elements at most"),
        ([TensorSpec(c, (2**39,), "float32") for c in "abc"], "elements at most"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(specs, text):
    with pytest.raises(RegistrationError, match=text):
        Layout(specs)


def test_a_description_is_short_and_names_groups_that_are_not_the_first():
    specs = [TensorSpec(c, (2, 3), "float32", i) for i, c in enumerate("ab")]
    assert describe(specs) == "a float32[2, 3], b float32[2, 3] of group 1"
    assert describe(specs * 3).endswith("and 2 more")
