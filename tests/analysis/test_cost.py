"""Cost in closed form against published sizes and loops over the definition."""

import itertools
import math

import pytest

from kernelbank.analysis.cost import Cost, cost, model_cost
from kernelbank.atlas import ROWS
from kernelbank.model import ModelSpec, SwinTrunk, Trunk, ViTTrunk
from kernelbank.spec import STEPS, All, Dilated, MixerSpec, Neighborhood, Own, SpecError, Window
from kernelbank.spec.inventory import inventory
from kernelbank.spec.support import sees, selections, visible_pairs, visible_range

SUPPORTS = [
    All(), Own(), Window(2), Window(3, 1), Window(4, 2), Window(7, 3), Window(5, 4), Dilated(3), Neighborhood(3),
    Neighborhood(5), Neighborhood(9),
]  # fmt: skip
GRIDS = [(1, 1), (4, 4), (5, 7), (8, 3), (7, 14)]


def plain(dim: int, heads: int) -> ViTTrunk:
    return ViTTrunk(embed_dim=dim, num_heads=heads, class_token=False, pos_embed="none", global_pool="avg")


def deit(dim: int, heads: int) -> ViTTrunk:
    return ViTTrunk(embed_dim=dim, num_heads=heads)


def swin(dim: int, third: int, head: int = 32) -> SwinTrunk:
    heads = tuple(dim * 2**stage // head for stage in range(4))
    return SwinTrunk(embed_dim=dim, depths=(2, 2, third, 2), num_heads=heads)


def at_224(trunk: Trunk, mixer: str, mlp: str = "ffn") -> Cost:
    return model_cost(ModelSpec(trunk=trunk, mixer=mixer, mlp=mlp, img_size=(224, 224)))


@pytest.mark.parametrize(
    ("trunk", "mixer", "params"),
    [
        (deit(192, 3), "vit", 5_717_416),
        (deit(384, 6), "vit", 22_050_664),
        (deit(768, 12), "vit", 86_567_656),
        (swin(96, 6), "swin", 28_288_354),
        (swin(96, 18), "swin", 49_606_258),
        (swin(128, 18), "swin", 87_768_224),
        (swin(96, 6), "dwnet", 24_172_744),
        (swin(96, 6), "ddwconv", 51_131_752),
        (swin(96, 6), "iddwconv", 26_243_176),
        (plain(384, 6), "dwsa", 20_253_040),
    ],
)
def test_parameters_are_the_published_ones(trunk: Trunk, mixer: str, params: int) -> None:
    assert at_224(trunk, mixer).params == params


@pytest.mark.parametrize(
    ("trunk", "mixer", "giga", "within"),
    [
        # computed from the equations of the paper's section 4
        (plain(384, 6), "vit_relpos", 4.574, 0.0005),
        (plain(384, 6), "dwsa", 4.051, 0.0005),
        (deit(384, 6), "dwsa position=none", 3.894, 0.0005),
        (plain(192, 3), "dwsa", 1.072, 0.0005),
        (plain(768, 12), "dwsa", 15.732, 0.0005),
        # without shifts every window is full: a shifted window that the grid cuts sees fewer kernels
        (swin(96, 6), "swin support=window(7)", 4.491, 0.0005),
        (swin(96, 6), "dwsa_window support=window(7)", 4.075, 0.0005),
        (swin(96, 6), "iddwconv", 4.374, 0.0005),
        # published; their counters add norms and biases or round
        (deit(192, 3), "vit", 1.26, 0.01),
        (deit(384, 6), "vit", 4.61, 0.02),
        (deit(768, 12), "vit", 17.58, 0.02),
        (swin(96, 6), "swin", 4.5, 0.03),
        (swin(96, 18), "swin", 8.7, 0.03),
        (swin(128, 18), "swin", 15.4, 0.03),
        (swin(96, 6), "dwnet", 3.8, 0.08),
        (swin(96, 6), "ddwconv", 3.8, 0.08),
        (swin(128, 18), "ddwconv", 13.0, 0.11),
        (swin(128, 18), "iddwconv", 14.3, 0.05),
    ],
)
def test_macs_are_the_published_ones(trunk: Trunk, mixer: str, giga: float, within: float) -> None:
    assert at_224(trunk, mixer).macs / 1e9 == pytest.approx(giga, abs=within)


@pytest.mark.parametrize(
    ("trunk", "mixer", "giga"),
    [(deit(192, 3), "vit", 1.08), (deit(384, 6), "vit", 4.24), (swin(96, 6), "swin", 4.36)],
)
def test_macs_of_modules_are_what_mmclassification_printed(trunk: Trunk, mixer: str, giga: float) -> None:
    assert at_224(trunk, mixer).macs_modules / 1e9 == pytest.approx(giga, abs=0.01)


# ---- selection -------------------------------------------------------------------------------------------


def positions(grid: tuple[int, int]) -> list[tuple[int, int]]:
    return list(itertools.product(range(grid[0]), range(grid[1])))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("support", SUPPORTS, ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
def test_counts_equal_loops(
    support: All | Window | Dilated | Neighborhood | Own, grid: tuple[int, int], prefix: int
) -> None:
    own = isinstance(support, Own)
    everywhere = positions(grid)
    seen = {query: frozenset(key for key in everywhere if sees(support, grid, query, key)) for query in everywhere}
    counts = [len(keys) + (0 if own else prefix) for keys in seen.values()]
    tokens = math.prod(grid) + prefix
    assert visible_pairs(support, grid, prefix) == sum(counts) + prefix * (1 if own else tokens)
    assert visible_range(support, grid, prefix) == (min(counts), max(counts))
    sets = {frozenset(keys) for keys in seen.values()}
    extra = prefix if own else int(prefix > 0 and frozenset(positions(grid)) not in sets)
    assert selections(support, grid, prefix) == len(sets) + extra
    assert all(query in keys for query, keys in seen.items())


def test_neighborhood_holds_all_its_kernels_at_borders() -> None:
    assert {key for key in positions((6, 6)) if sees(Neighborhood(3), (6, 6), (0, 5), key)} == {
        (y, x) for y in (0, 1, 2) for x in (3, 4, 5)
    }


def test_shift_is_zero_where_the_window_fills_the_side() -> None:
    assert sees(Window(7, 3), (7, 14), (0, 3), (6, 9)) and not sees(Window(7, 3), (7, 14), (0, 2), (0, 3))


def test_pooled_cells() -> None:
    assert visible_pairs(All(), (5, 4), prefix=1, stride=2) == (1 + 20) * (1 + 6)


def test_alternating_shift_must_be_resolved() -> None:
    with pytest.raises(SpecError, match="at_block"):
        cost(MixerSpec.parse("swin"), 32, 2, (14, 14))


# ---- mixers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_every_row_costs_what_its_inventory_holds(row: str) -> None:
    spec = MixerSpec.parse(row).at_block(1)
    counted = cost(spec, 64, 4, (9, 8), prefix=1)
    learned = [t for t in inventory(spec, 64, 4, (9, 8), 1) if not t.buffer]
    assert counted.params == sum(tensor.numel for tensor in learned)
    assert counted.macs >= counted.macs_modules >= 0
    assert counted.macs or counted.multiplies


def loops(text: str, grid: tuple[int, int], dim: int, heads: int) -> int:
    """Multiply-adds of a row at size 1 without prefix, counted one product at a time."""
    spec = MixerSpec.parse(text)
    count = 0
    for query in positions(grid):
        count += dim * dim * 2  # q, out
        count += dim * dim * (2 if "two_step" in str(spec.kernel) else 1)  # k, v
        for key in positions(grid):
            if sees(spec.support, grid, query, key):
                count += 2 * dim if "two_step" in str(spec.kernel) else dim * (spec.text["position"] == "relative")
        count += 0 if "two_step" in str(spec.kernel) else dim  # gate
    return count


@pytest.mark.parametrize(
    "text",
    ["vit", "swin support=window(3, 1)", "nat support=neighborhood(3)", "dwsa", "dwsa position=none",
     "dwsa_window support=window(4, 2)"],
)  # fmt: skip
def test_macs_equal_loops(text: str) -> None:
    assert cost(MixerSpec.parse(text), 12, 3, (5, 7)).macs == loops(text, (5, 7), 12, 3)


def test_two_step_products() -> None:
    """The products of the two steps: T n C (k k + 1); a project costs 2 n r C; a stride shrinks n."""
    T, C = 1 + 16, 8
    vit, wide = (cost(MixerSpec.parse(t), C, 2, (4, 4), 1) for t in ("vit", "vit3"))
    assert vit.macs - vit.macs_modules == 2 * T * T * C
    assert wide.macs - wide.macs_modules == T * T * C * 10
    low = cost(MixerSpec.parse("linformer mix=project(5)"), C, 2, (4, 4), 1)
    assert low.macs - low.macs_modules == 2 * T * 5 * C + 2 * T * 5 * C
    strided = cost(MixerSpec.parse("strided_bank"), C, 2, (4, 4), 1)
    assert strided.macs - strided.macs_modules == 2 * T * 5 * C
    assert strided.macs_modules == 2 * T * C * C + 2 * 5 * C * C


def test_one_step_products() -> None:
    N, C, K = 20, 8, 4
    predicted = cost(MixerSpec.parse("dconv"), C, 2, (4, 5))
    assert predicted.macs_modules == C * 2 + 2 * K
    assert predicted.macs == predicted.macs_modules + K * (9 * C * C + C) + N * 9 * C * C
    pooled = cost(MixerSpec.parse("se bank=dynamic(4, sigmoid)"), C, 2, (4, 5))
    assert (pooled.macs_modules, pooled.macs) == (2 * C * 2, 2 * C * 2 + N * C)
    static = cost(MixerSpec.parse("conv"), C, 2, (4, 5))
    assert static.macs == static.macs_modules == N * 9 * C * C
    box = cost(MixerSpec.parse("pool"), C, 2, (4, 5))
    assert box == Cost(multiplies=N * C)
    ffn = cost(MixerSpec.parse("ffn"), C, 2, (4, 5))
    assert ffn.macs == ffn.macs_modules == 8 * N * C * C


def test_qk_norm_adds_its_affines() -> None:
    spec, normed = MixerSpec.parse("vit"), MixerSpec.parse("vit_qk_norm")
    assert cost(normed, 8, 2, (2, 2)).params - cost(spec, 8, 2, (2, 2)).params == 4 * 4


def test_a_step_adds_its_multiplies_per_score() -> None:
    for name, kind in STEPS.items():
        step = "scale(2)" if name == "scale" else name
        mixer = MixerSpec.parse(f"vit activation={step}")
        plain = MixerSpec.parse("vit activation=identity")
        assert cost(mixer, 8, 2, (2, 2)).multiplies - cost(plain, 8, 2, (2, 2)).multiplies == kind.multiplies * 2 * 16


# ---- backbones -------------------------------------------------------------------------------------------


def test_costs_add() -> None:
    total = Cost(1, 2, 3, 4, 5) + Cost(10, 20, 30, 40, 50)
    assert total == Cost(11, 22, 33, 44, 55)
    assert (total.parameter_bytes(), total.activation_bytes(2)) == (44, 110)


def test_a_spec_per_stage_and_no_mlp() -> None:
    trunk = swin(32, 2, head=16)
    mixed = at_224(trunk, "dwnet | dwnet | swin | swin", "ffn | ffn | none | none")
    assert mixed.params < at_224(trunk, "dwnet | dwnet | swin | swin").params
    bare = at_224(plain(64, 2), "vit", "none")
    blocks = 12 * (8 * 64 * 64 + 64 + 4 * 64 + 2 * 64)  # ffn with its biases, and norm2
    assert at_224(plain(64, 2), "vit").params - bare.params == blocks


def test_odd_grids_are_merged_rounding_up() -> None:
    trunk = SwinTrunk(embed_dim=8, depths=(1, 1), num_heads=(1, 1))
    spec = ModelSpec(trunk=trunk, mixer="dwsa", mlp="none", img_size=(20, 28), num_classes=0)
    assert model_cost(spec).params == (
        3 * 16 * 8 + 8 + 16  # patch embedding and its norm
        + 2 * 8 + 3 * (64 + 8) + 9 * 13  # block at 5 x 7
        + 64 + 32 * 16  # merging
        + 2 * 16 + 3 * (256 + 16) + 5 * 7  # block at 3 x 4
        + 32
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trunk", "mlp", "size"),
    [
        (deit(64, 2), "ffn", (225, 224)),
        (swin(32, 2), "none | none", (224, 224)),
    ],
)
def test_what_no_model_can_be_is_refused(trunk: Trunk, mlp: str, size: tuple[int, int]) -> None:
    with pytest.raises(SpecError):
        model_cost(ModelSpec(trunk=trunk, mixer="vit", mlp=mlp, img_size=size))
