"""Each bug planted in a function in C is caught by what the suite compares: the function alone has
it, the others of the library are right. No bug reads or writes outside a tensor."""

from __future__ import annotations

import pytest

from ..helpers.mutation import of_kernels
from ..helpers.native_mutation import Bug, Builds, exported, planted, used
from .native_checks import CHECKS

BUGS: dict[str, dict[str, Bug]] = {
    "zaya_gemm": {
        "accumulate ignored": Bug("if (c.accumulate)  ", "if (0)  ", "products"),
        "accumulate ignored in the last columns": Bug(
            "if (c.accumulate) sum +=", "if (0) sum +=", "products"
        ),
        "a block of the sum forgets the others": Bug("sums.accumulate = 1;", ";", "long products"),
        "bf16 sums rounded between blocks": Bug(
            "int apart = ", "int apart = 0 && ", "long products in bf16"
        ),
        "bf16 pairs in the wrong order": Bug(
            "or_si512(low, _mm512_slli_epi32(high,", "or_si512(high, _mm512_slli_epi32(low,",
            "products in bf16", "__AVX512BF16__",
        ),
        "half of the last pair ignored": Bug(
            "return 2 * s + 1 < k", "return 2 * s + 2 < k", "long products in bf16",
            "__AVX512BF16__",
        ),
        "rows of the last panel turned over": Bug(
            "element(x, type, i, s, k)", "element(x, type, count - 1 - i, s, k)", "products"
        ),
        "high half of a vector twice": Bug(
            "x[i + LANES / 2], HIGH_LANES)", "x[i + LANES / 2], LOW_LANES)", "long products"
        ),
        "tile of eight rows subtracts": Bug(
            "TILE(tile_8, 8, FMA)",
            "#define AWAY(sum, x, y) ((sum) - (x) * (y))\nTILE(tile_8, 8, AWAY)", "wide products",
            "__AVX512F__",
        ),
        "every block begins with the first column": Bug(
            "columns_of(p, start, stop < n", "columns_of(p, 0, stop < n", "wide products"
        ),
    },
    "zaya_cca": {
        "document ignored by a tap": Bug(
            "if (position(t, first + i) >= back)", "if (position(t, first + i) >= 0)", "cca"
        ),
        "document ignored by the mix": Bug(
            "const float *from = inside ? ", "const float *from = 1 ? ", "cca"
        ),
        "halo off by one": Bug("s->halo_rows + token) *", "s->halo_rows + token - 1) *", "cca"),
        "a chunk begins its document": Bug("? own[0] + token", "? token", "cca"),
        "mean of queries is a sum": Bug("raw + m * d, 0.5f / queries", "raw + m * d, 0.5f", "cca"),
        "rotation the wrong way": Bug("a * cos - b * sin", "a * cos + b * sin", "cca"),
        "temperature left out": Bug("if (m == queries) scale *=", "if (0) scale *=", "cca"),
        "tail of a head not in its norm": Bug(
            "for (; i < count; i++) sum +=", "for (; i < 0; i++) sum +=", "cca of odd sizes"
        ),
        "stride of queries that of keys": Bug(
            "                                       : token * s->heads + head_of(t, m);",
            ": token * s->kv_heads + head_of(t, m);", "cca",
        ),
    },
    "zaya_cca_backward": {
        "pull of the norm left out": Bug("grad[c] * scale - x[c] * pull", "grad[c] * scale", "cca"),
        "document ignored for the rows": Bug(
            "back < t->s->depth_taps && back <= place", "back < t->s->depth_taps", "cca"
        ),
        "document ignored by the mix": Bug("float *to = inside ? ", "float *to = 1 ? ", "cca"),
        "nothing goes to the block before": Bug(
            "memmove(x + count * width, x, keep", "memset(x + count * width, 0, keep", "cca"
        ),
        "halo without its share of the mix": Bug("first ? 0 : -reach", "0", "cca"),
        "halo's gradient one row off": Bug(
            "write_tokens(t, g->x, out->to_halo", "write_tokens(t, g->x + t->width, out->to_halo",
            "cca",
        ),
        "temperature's gradient not scaled": Bug("+= along * scale;", "+= along;", "cca"),
        "taps the wrong way round": Bug(
            "taps + taps - 1 - back] += g->depth", "taps + back] += g->depth", "cca"
        ),
        "keys' share of the mean left out": Bug(
            "add_scaled(to_key, query, 0.5f, d)", "add_scaled(to_key, query, 0, d)", "cca"
        ),
        "tail of a head not in its norm": Bug(
            "for (; i < count; i++) sum +=", "for (; i < 0; i++) sum +=", "cca of odd sizes"
        ),
    },
    "zaya_attention": {
        "mask off by one": Bug("row / t->group + 1;", "row / t->group;", "attention of odd sizes"),
        "keys from the row's start": Bug(
            "(t->segment.key_start + first) * row", "first * row", "attention of odd sizes"
        ),
        "keys of another group": Bug(
            "first) * row + t->head *", "first) * row + (t->shape->kv_heads - 1 - t->head) *",
            "attention of odd sizes",
        ),
        "heads out of order": Bug(
            "t->head * t->group + row % t->group", "row % t->group * t->shape->kv_heads + t->head",
            "attention",
        ),
        "old sum not shrunk": Bug(
            "norm[i] * shrink + more", "norm[i] + more", "attention of odd sizes"
        ),
        "old output not shrunk": Bug(
            "if (start && shrink != 1)", "if (0)", "attention of odd sizes"
        ),
        "scores not scaled": Bug(
            "(score + i) * scale - best", "(score + i) - best", "attention of odd sizes"
        ),
        "rest of a vector not masked": Bug(
            "for (long i = count; i < padded", "for (long i = padded; i < padded",
            "attention of odd sizes",
        ),
        "last vector not among the largest": Bug(
            "if (i == padded) top", "if (0) top", "attention of large scores"
        ),
        "row sums without their logarithm": Bug(
            "top[i] + logf(norm[i])", "top[i] + norm[i]", "attention of odd sizes"
        ),
    },
    "zaya_attention_backward": {
        "mask off by one": Bug("row / t->group + 1;", "row / t->group;", "attention of odd sizes"),
        "mean under the weights left out": Bug(
            "(slope + j) - mean)", "(slope + j) - 0)", "attention of odd sizes"
        ),
        "gradient of scores not scaled": Bug(
            "- mean) * scale", "- mean)", "attention of odd sizes"
        ),
        "later keys not masked": Bug(
            "score[j] = -INFINITY, slope[j] = 0;", "slope[j] = 0;", "attention of odd sizes"
        ),
        "blocks of keys forget the others": Bug(
            "first * size, size, FP32, start > 0}", "first * size, size, FP32, 0}",
            "attention of odd sizes",
        ),
        "keys from the row's start": Bug(
            "(t->segment.key_start + start + j) * row", "(start + j) * row",
            "attention of odd sizes",
        ),
        "shared keys of the last segment only": Bug(
            "[to] += for_k", "[to] = for_k", "attention behind keys"
        ),
        "last vector of a head ignored": Bug(
            "for (long c = 0; c < size; c += LANES)",
            "for (long c = 0; c + LANES <= size; c += LANES)", "attention of odd sizes",
        ),
    },
    "zaya_norm_residual": {
        "mean over whole vectors": Bug(
            "total(squares) / s.width", "total(squares) / ((s.width + LANES - 1) / LANES * LANES)",
            "norm of odd sizes",
        ),
        "last vector not in the mean": Bug(
            "squares += x * x;", "if (left >= LANES) squares += x * x;", "norm of odd sizes"
        ),
        "bias of the stream left out": Bug(
            "stream += load_few(in->stream_bias, FP32, c, left);", "", "norm"
        ),
        "scale of the branch for the stream": Bug(
            "stream * load_few(in->stream_scale", "stream * load_few(in->branch_scale", "norm"
        ),
        "weight left out": Bug("x * scale * weight", "x * scale", "halves of the norm"),
        "types of a special case for others": Bug(
            "return s->stream == stream && ", "return ", "halves of the norm"
        ),
    },
    "zaya_norm_residual_backward": {
        "pull along the row left out": Bug("(own - *(vec *)(x + c) * mean)", "own", "norm"),
        "one span of rows only": Bug(
            "wide[j * s->width + c] += ", "wide[j * s->width + c] = ", "norm"
        ),
        "last part of the rows left out": Bug(
            "part = 1; part < s->parts; part++", "part = 1; part < s->parts - 1; part++", "norm"
        ),
        "gradient of the stream left out": Bug("if (g.grad_out) grad", "if (0) grad", "norm"),
        "bias not in the scale's gradient": Bug(" + in->stream_bias[c] * whole", "", "norm"),
        "another scale for a bias": Bug(
            "(float)(in->branch_scale[c] * whole)", "(float)(in->stream_scale[c] * whole)", "norm"
        ),
        "last vector not in the mean": Bug(
            "dots += product * load_few", "if (left >= LANES) dots += product * load_few",
            "norm of odd sizes",
        ),
    },
    "zaya_router": {
        "earlier state left out": Bug("if (in->previous)", "if (0)", "router"),
        "mean over the wrong width": Bug(
            "total(squares) / s->width", "total(squares) / s->hidden", "router"
        ),
        "choice without the bias": Bug(
            "x[c] + bias[c] > x[best] + bias[best]", "x[c] > x[best]", "choice"
        ),
        "last of equals": Bug("x[c] + bias[c] >", "x[c] + bias[c] >=", "equal classes"),
        "bias of the first activation": Bug(
            "activate(z2, in->fc2_bias", "activate(z2, in->fc1_bias", "router"
        ),
        "classes that only fill": Bug(
            "l < LANES; l++) e[l] = 0;", "l < 0; l++) e[l] = 0;", "router"
        ),
        "probability of another token": Bug(
            "probability[first + r] = row", "probability[first + r] = probabilities", "router"
        ),
        "last vector not in the mean": Bug(
            "squares += x * x;", "if (left >= LANES) squares += x * x;", "router of odd sizes"
        ),
    },
    "zaya_router_backward": {
        "pull of the softmax left out": Bug("((c == chosen) - p[c])", "(c == chosen)", "router"),
        "pull of the norm left out": Bug("(own - columns(n, c, left) * mean)", "own", "router"),
        "later layers left out": Bug("if (g->state) own", "if (0) own", "router"),
        "slope without the density": Bug("(share + x * density)", "share", "router"),
        "a block forgets the others": Bug(", b.add = 1;", ";", "router"),
        "last rows not in the sums": Bug(
            "first < rows; first += SPAN", "first + SPAN <= rows; first += SPAN", "router"
        ),
        "gradient of a weight turned": Bug(
            "gemm(w, w, rows, turned(before, w), plain(h, w)",
            "gemm(w, w, rows, turned(h, w), plain(before, w)", "router",
        ),
        "last vector not in the mean": Bug(
            "dots += x * by;", "if (left >= LANES) dots += x * by;", "router of odd sizes"
        ),
    },
    "zaya_experts": {
        "up where gate is": Bug(
            "silu_of(g) * load(up, type, i)", "g * silu_of(load(up, type, i))", "experts"
        ),
        "rest of a row without up": Bug(
            "silu_of(all(g))[0] * at(up, type, i)", "silu_of(all(g))[0]", "experts"
        ),
        "another expert's weights": Bug(
            "turned(offset(down, e * d * f, type)", "turned(offset(down, 0, type)", "experts"
        ),
        "rows of the expert before": Bug("e < expert; e++", "e < expert - 1; e++", "experts"),
    },
    "zaya_experts_backward": {
        "slope of silu left out": Bug("by * u * (s + silu * (1 - s))", "by * u * s", "experts"),
        "slope of silu left out in the rest": Bug(
            "grad[i] * u * (s + silu * (1 - s))", "grad[i] * u * s", "experts"
        ),
        "gradient of up with up": Bug("by * silu);", "by * u);", "experts in bf16"),
        "another expert's weights": Bug(
            "plain(offset(x->gate_up, e * 2 * f * d, type)", "plain(offset(x->gate_up, 0, type)",
            "experts",
        ),
        "rows of the first expert": Bug("plain(rows, d)", "plain(x->rows, d)", "experts"),
    },
    "zaya_gather": {
        "rows of their places": Bug(
            "row(s, tokens, order[place])", "row(s, tokens, place)", "moves"
        ),
        "first expert row not written": Bug(
            "place = 0; place < s->routed", "place = 1; place < s->routed", "moves"
        ),
        "half of a row": Bug(
            "row(s, tokens, order[place]), bytes)", "row(s, tokens, order[place]), bytes / 2)",
            "moves",
        ),
    },
    "zaya_scatter": {
        "rows to their places": Bug(
            "*to = row(s, out, token);", "*to = row(s, out, place);", "moves"
        ),
        "rest by place": Bug(
            "place) : rest ? row(s, rest, token)", "place) : rest ? row(s, rest, place)", "moves"
        ),
        "probability of another token": Bug(
            "write_scaled(s, to, from, at(probability, exact, token))",
            "write_scaled(s, to, from, at(probability, exact, place))", "moves",
        ),
        "last vector not scaled": Bug(
            "load_few(x, s->type, c, left) * factor",
            "load_few(x, s->type, c, left) * (left < LANES ? 1 : factor)", "moves",
        ),
    },
    "zaya_scatter_backward": {
        "gradient of places": Bug(
            "*grad = row(s, x->grad, token);", "*grad = row(s, x->grad, place);", "moves"
        ),
        "gradient without probability": Bug(
            "write_scaled(s, to, grad, at(x->probability, exact, token))",
            "write_scaled(s, to, grad, 1)", "moves",
        ),
        "skipped tokens without a gradient of probability": Bug(
            "place) : x->rest ? row(s, x->rest, token) : NULL", "place) : NULL", "moves"
        ),
        "gradient of rest by place": Bug(
            "row(s, x->to_rest, token)", "row(s, x->to_rest, place)", "moves"
        ),
        "last vector not in the product": Bug(
            "sum += load_few(x, s->type, c, left) *",
            "sum += (left < LANES ? 0.0f : 1.0f) * load_few(x, s->type, c, left) *", "moves",
        ),
        "type of probability that of rows": Bug(
            "at(x->probability, exact, token)", "at(x->probability, s->type, token)",
            "exact probabilities",
        ),
    },
    "zaya_loss": {
        "z-loss without its gradient": Bug("1 + 2 * z_loss * size", "1", "loss"),
        "z-loss not squared": Bug("z_loss * size * size", "z_loss * size", "loss"),
        "label of another row": Bug("chosen = x[targets[r]]", "chosen = x[targets[0]]", "loss"),
        "label without its gradient": Bug("* factor - 1);", "* factor);", "loss in bf16"),
        "last classes without their factor": Bug(
            "i++) put(to, type, i, exp_of(all(x[i] - top))[0] * factor)",
            "i++) put(to, type, i, exp_of(all(x[i] - top))[0])", "loss",
        ),
        "last classes not among the largest": Bug(
            "i < count; i++) top = fmaxf", "i < 0; i++) top = fmaxf", "large loss"
        ),
        "last span of classes only": Bug(
            "sum += total(part);", "sum = total(part);", "loss of many classes"
        ),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("native"))


@of_kernels(BUGS)
def test_a_bug_in_c_is_caught(kernel: str, bug: str, builds: Builds) -> None:
    found = BUGS[kernel][bug]
    if found.needs and found.needs not in builds.macros:
        pytest.skip(f"a processor without {found.needs}")
    with planted(kernel, found, builds), pytest.raises(AssertionError):
        CHECKS[found.check]()


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_bug_nothing_is_caught(check: str, builds: Builds) -> None:
    with used(builds.right):
        CHECKS[check]()


def test_a_bug_is_in_one_function_alone(builds: Builds) -> None:
    forward = BUGS["zaya_cca"]["temperature left out"]
    with planted("zaya_cca_backward", forward, builds):
        CHECKS[forward.check]()


def test_every_function_in_c_has_planted_bugs() -> None:
    assert {name for name, bugs in BUGS.items() if len(bugs) >= 3} == set(exported())
