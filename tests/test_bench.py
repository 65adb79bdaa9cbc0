"""The benchmark: its floor against closed forms and torch's counter, its contestants against each other, its report and its command.

No test looks at a time.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import CONFIGS, DEPTH, WIDTH, tiny
from torch import Tensor
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from patchscopes import bench as benchmark
from patchscopes.bench.agreement import compare
from patchscopes.bench.contestants import Local, hooks_in_one_batch, local, ours
from patchscopes.bench.floor import floor, own_kv_bytes
from patchscopes.bench.measure import counted_bytes, counted_flops, eager_attention, peak_bytes, token_blocks
from patchscopes.bench.models import Subject, subject
from patchscopes.bench.parts import Found, Settings, decoding_part, grids, memory_part, prefix_part, reads_part
from patchscopes.bench.peer import PROGRAMS, Peer, PeerError, find_python
from patchscopes.bench.report import Figure
from patchscopes.bench.turns import ratios, take_turns
from patchscopes.bench.work import Answer, Work, grid, stop_at
from patchscopes.cli import app
from patchscopes.cli import bench as command
from patchscopes.core.errors import InputError, UnknownName
from patchscopes.engine.engine import Engine
from patchscopes.engine.shape import BlockShape, Shape, active_weights, measure

CPU = torch.device("cpu")
TINY = "gpt2:2x32"


@pytest.fixture(scope="module")
def s() -> Subject:
    return subject(TINY, device="cpu")


def works(s: Subject, tokens: int, count: int = 2) -> list[Work]:
    return grids(s, Settings(vectors=2, prefix=5), prefix=5, tokens=tokens, count=count)


# ------------------------------------------------------------------------------------------------------------------ floor


def gpt2_small() -> Shape:
    """From its sizes alone: P_b = 12 d², u = 2 d · vocab."""
    d, vocab = 768, 50257
    return Shape((BlockShape(12 * d * d, 4 * 12 * d * d, 12, 12, 64, 64, None),) * 12, d * vocab, 4 * d * vocab, 4)


def big_grid(tokens: int) -> Work:
    return grid(12, 4, 50257, vectors=12, prefix=22, suffix=2, tokens=tokens, seed=0, device=CPU)


def test_the_floor_of_a_grid_on_gpt2_small_is_the_closed_form() -> None:
    c, u = 24 * 768**2, 2 * 768 * 50257
    found = floor(gpt2_small(), big_grid(1))
    assert found.base.matmul == 12 * 24 * c + u
    assert found.rows.matmul == 12 * 78 * 2 * c + 144 * u
    assert found.decode.total == 0
    assert round(found.flops.matmul / 1e9, 3) == 41.770
    assert round(floor(gpt2_small(), big_grid(10)).flops.matmul / 1e9, 2) == 361.96
    assert found.base.attention == 12 * 4 * 768 * 24 * 25 / 2


def test_rows_that_stop_early_need_fewer_tokens_and_the_bytes_of_the_longest() -> None:
    work, shape = big_grid(10), gpt2_small()
    stopped = floor(shape, work, [3] * 143 + [1])
    assert stopped.decode.matmul == 143 * 2 * (12 * 24 * 768**2 + 2 * 768 * 50257)
    weights, head, kv = 12 * shape.blocks[0].n_bytes, shape.head_bytes, 12 * 12 * 128 * 4
    assert stopped.weight_bytes == 2 * (weights + head) + 2 * (weights + head)
    assert stopped.kv_bytes == 144 * kv * 2 + 143 * kv * (25 + 26)
    assert own_kv_bytes(shape, work, [1] * 144) == kv // 12 * 12 * 2 * 78


def test_a_window_bounds_attention() -> None:
    block = BlockShape(1, 1, 2, 1, 8, 4, 6)
    assert [block.attention(n) for n in (1, 6, 9)] == [48, 288, 288]


def test_active_weights_of_a_gpt2_block_are_12_d_squared() -> None:
    config = GPT2Config()
    with torch.device("meta"):
        assert active_weights(GPT2Block(config), config) == 12 * 768**2


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3", "mixtral", "phi3", "opt"])
def test_the_floor_of_a_plain_pass_is_what_the_counter_counts(family: str) -> None:
    """Grouped heads, gates, experts, windows: all from the weights. Eager attention is counted as full rectangles."""
    hf = tiny(family)
    if family == "mixtral":
        hf.set_experts_implementation("eager")  # the counter misses the grouped matmul
    engine, length = Engine(hf), 9
    shape = measure(engine)
    found = floor(shape, Work(torch.ones(1, length, dtype=torch.long), 8, (DEPTH,), torch.zeros(1, WIDTH), 1))
    ids = torch.ones(1, length, dtype=torch.long)
    with torch.no_grad():
        _, flops = counted_flops(lambda: hf(ids, use_cache=False, logits_to_keep=1), hf)
    heads, grouped = CONFIGS[family].num_attention_heads, family not in ("gpt2", "opt")
    assert {(b.heads, b.kv_heads) for b in shape.blocks} == {(heads, 2 if grouped else heads)}
    rectangles = sum(2 * b.heads * (b.d_qk + b.d_v) * length**2 for b in shape.blocks)
    assert flops == found.base.matmul + rectangles


def test_what_the_engine_runs_is_the_floor_and_little_more(s: Subject) -> None:
    (work,) = works(s, 4, 1)
    answer, flops = counted_flops(lambda: ours(s, work), s.hf)
    assert len(answer.rows) == 4
    needed = floor(measure(s.engine), work)
    # the floor unembeds the unpatched run once, as its baseline; a readout of patched rows alone does without it
    assert 1 <= (flops + needed.base.head) / needed.flops.total <= 1.2
    with token_blocks(s.engine) as calls:
        ours(s, work)
    assert sum(calls) == 2 * 7 + (2 + 1) * 2 * 2 + 3 * 4 * 2


# ---------------------------------------------------------------------------------------------------------------- measure


def test_the_peak_counts_what_lives_at_once() -> None:
    def run() -> Tensor:
        a = torch.zeros(1000)
        b = a + 1  # 8000 bytes live
        del a
        c = b.view(10, 100)  # a view is no memory
        return c * 2  # 8000 again

    result, peak = peak_bytes(run, CPU)
    assert result.shape == (10, 100)
    assert peak == 8000


def test_weights_are_read_once_an_operator() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        _, traffic = counted_bytes(lambda: layer(torch.ones(2, 8)), layer)
    assert traffic.weights == 8 * 4 * 4
    assert traffic.moved >= traffic.weights + (2 * 8 + 2 * 4) * 4


def test_counting_leaves_the_attention_as_it_was(s: Subject) -> None:
    before = s.hf.config._attn_implementation
    with pytest.raises(ZeroDivisionError), eager_attention(s.hf):
        assert s.hf.config._attn_implementation == "eager"
        1 / 0  # noqa: B018
    assert s.hf.config._attn_implementation == before != "eager"


# ------------------------------------------------------------------------------------------------------------ contestants


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", [TINY, "llama:2x64"])
def test_all_contestants_of_this_process_say_the_same(name: str, tokens: int) -> None:
    s = subject(name, device="cpu")
    some = [local(n, s, alone=3) for n in ("ours", "one_at_a_time", "hooks", "prefix_cache", "generate")]
    scores = take_turns(some, s, works(s, tokens, 3), count=True)
    for n, score in scores.items():
        assert len(score.seconds) == 2
        assert score.flops
        assert score.warm_up[score.variant] == min(score.warm_up.values())
        if n != "generate":
            assert score.agreement is not None
            assert score.agreement.ok, score.agreement.reason
            assert score.agreement.error < 1e-5
            assert score.agreement.rows > 0
        assert len(ratios(score, scores["ours"])) == 2
    assert scores["one_at_a_time"].sampled
    # a pass alone unembeds every position; `generate` only the last
    hooks, alone = scores["hooks"].flops or 0, scores["one_at_a_time"].flops or 0
    assert (hooks < alone) if tokens == 1 else (hooks == alone)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in s.hf.modules())


def test_a_target_of_one_token_after_i_star_is_patched_once_only(s: Subject) -> None:
    """Then the prompt pass behind a prefix cache looks like a step of decoding."""
    work = replace(works(s, 4, 1)[0], position=6)
    answers = [local(n, s, alone=None).run(work, "")[0] for n in ("ours", "prefix_cache", "one_at_a_time")]
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens


def test_stops_end_all_contestants_at_the_same_place(s: Subject) -> None:
    work = works(s, 6, 1)[0]
    free = ours(s, work).tokens
    stop = stop_at(lambda ids: "".join(f"<{i}>" for i in ids), [f"<{free[0][2]}>"])
    stopped = replace(work, stop=stop, end=frozenset({free[1][1]}))
    answers = [way(s, stopped).tokens for way in (ours, hooks_in_one_batch)]
    assert answers[0] == answers[1]
    assert len(answers[0][0]) <= 2
    assert any(len(said) < 6 for said in answers[0])


def test_who_disagrees_is_marked_and_gets_no_ratio(s: Subject) -> None:
    def wrong(s: Subject, work: Work) -> Answer:
        answer = hooks_in_one_batch(s, work)
        return Answer(answer.rows, answer.logits + answer.logits.abs().max() / 100, answer.tokens)

    some = [local("ours", s, alone=None), local("hooks", s, alone=None), Local("wrong", s, {"": wrong})]
    scores = take_turns(some, s, works(s, 1), count=False)
    agreement = scores["wrong"].agreement
    assert agreement is not None
    assert not agreement.ok
    assert "logits differ by 1" in agreement.reason
    assert ratios(scores["wrong"], scores["ours"]) == []
    assert len(ratios(scores["hooks"], scores["ours"])) == 1


def test_a_tie_is_told_and_a_difference_is_not_excused() -> None:
    work = Work(torch.ones(1, 2, dtype=torch.long), 1, (0,), torch.zeros(1, 4), 3)
    logits = torch.tensor([[1.0, 0.99999, 0.5]])
    a, b = Answer([0], logits, [[2, 0, 1]]), Answer([0], logits, [[2, 1, 1]])
    tie = compare(a, b, work, lambda *_: logits[0], 1e-4)
    assert tie.ok
    assert "row 0, token 1: 0 and 1 are 1.0e-05" in tie.ties[0]
    other = compare(a, b, work, lambda *_: torch.tensor([1.0, 0.9, 0.5]), 1e-4)
    assert not other.ok
    assert "row 0 says 0 as its token 1; the reference says 1" in other.reason
    short = compare(Answer([0], logits, [[2]]), b, work, lambda *_: logits[0], 1e-4)
    assert "ends after 1 tokens; the reference after 3" in short.reason


# ------------------------------------------------------------------------------------------------------------------ peers

FAKE = """
import sys
sys.path.insert(0, {programs!r})
from serving import serve

def load(folder, blocks_path, device):
    import torch
    print("what libraries print is not an answer")
    def wrong(work):
        logits = torch.eye(len(work["layers"]), {vocab})
        return logits, logits.argmax(-1, keepdim=True)
    def broken(work):
        raise RuntimeError("no such kernel")
    return None, {{"wrong": wrong, "broken": broken}}, {{}}, {{"fake": "1.0"}}

serve(load)
"""


def test_a_peer_runs_in_its_own_process_and_is_compared(s: Subject, tmp_path: Path) -> None:
    program = tmp_path / "with_fake.py"
    program.write_text(FAKE.format(programs=str(PROGRAMS), vocab=s.engine.vocab))
    peer = Peer("fake", s, tmp_path, Path(sys.executable), program=program)
    try:
        assert peer.versions["fake"] == "1.0"
        assert peer.variants(1) == ["wrong", "broken"]
        scores = take_turns([local("ours", s, alone=None), local("hooks", s, alone=None), peer], s, works(s, 1), count=False)
        with pytest.raises(PeerError, match="no such kernel"):
            peer.run(works(s, 1)[0], "broken")
    finally:
        peer.close()
    score = scores["fake"]
    assert list(score.warm_up) == ["wrong"]
    assert score.agreement is not None
    assert not score.agreement.ok
    assert ratios(score, scores["ours"]) == []


def test_a_peer_whose_program_ends_says_its_last_words(s: Subject, tmp_path: Path) -> None:
    program = tmp_path / "with_nothing.py"
    program.write_text("raise SystemExit('there is no such library')")
    with pytest.raises(PeerError, match="there is no such library"):
        Peer("nothing", s, tmp_path, Path(sys.executable), program=program)


def test_a_peer_that_is_not_installed_is_a_finding() -> None:
    with pytest.raises(PeerError, match="make bench-peers"):
        find_python("no-such-package-as-this", None)
    assert find_python("torch", Path(sys.executable)) == Path(sys.executable)


def test_the_peers_programs_import_nothing_of_this_package() -> None:
    for program in PROGRAMS.glob("[sw]*.py"):
        assert "import patchscopes" not in program.read_text()
        assert "from patchscopes" not in program.read_text()


# ------------------------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("part", [prefix_part, reads_part, memory_part, decoding_part], ids=lambda p: p.__name__)
def test_every_part_gives_figures(part, s: Subject) -> None:
    found, seen = Found(), []
    part(s, Settings(tokens=(1, 3), vectors=1, repeat=1, rows=3), found, lambda done, of, what: seen.append((done, of)))
    assert found.figures
    assert all(f.value is not None and f.value > 0 for f in found.figures)
    assert seen[-1][0] == seen[-1][1]


def test_a_prefix_that_does_not_fit_is_told(s: Subject) -> None:
    with pytest.raises(InputError, match="reads at most 1024"):
        grids(s, Settings(), prefix=1020, tokens=20, count=1)


def test_goals() -> None:
    assert [Figure("p", "f", v, at_most=1.05).reached for v in (1.05, 1.06, None)] == [True, False, None]
    assert [Figure("p", "f", v, at_least=12).reached for v in (12.0, 11.9)] == [True, False]
    assert Figure("p", "f", 3.0).reached is None


@pytest.mark.parametrize("name", ["gpt2:12", "llama:2x65", "llama:0x64", "llama:lots"])
def test_a_size_that_is_none_is_told(name: str) -> None:
    with pytest.raises(UnknownName, match="llama:160m"):
        subject(name)


def test_random_models_are_as_big_as_asked() -> None:
    s = subject("llama:3m", device="cpu")
    blocks = sum(p.numel() for p in s.engine.blocks[0].parameters()) * s.engine.n_layers
    assert 1e6 < blocks < 9e6


def test_random_models_are_made_in_the_format_asked_for() -> None:
    assert subject(TINY, device="cpu").dtype == torch.float32
    found = subject(TINY, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in found.hf.parameters()} == {found.dtype} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------- command


def test_the_command_prints_figures_and_writes_json(capsys, tmp_path: Path) -> None:
    out = tmp_path / "new" / "bench.json"
    args = ["--model", TINY, "--parts", "grid,memory", "--tokens", "1,3", "--repeat", "1", "--vectors", "2", "--alone", "2"]
    python = ["--peers-python", str(tmp_path / "bin" / "python")]
    (tmp_path / "bin").mkdir()
    Path(python[1]).symlink_to(sys.executable)
    assert app.run(["bench", *args, *python, "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "FLOPs executed" in printed.out
    assert "all say the same" in printed.out
    assert "grid, 3 tokens" in printed.err
    found = json.loads(out.read_text())
    assert set(found) == {"format", "time", "model", "settings", "machine", "peers", "figures", "contestants", "floor"}
    assert found["model"]["n_layers"] == 2
    assert set(found["contestants"]) == set(found["floor"]) == {"grid, one token", "grid, 3 tokens"}
    score = found["contestants"]["grid, one token"]["hooks"]
    assert len(score["seconds"]) == 1
    assert score["agreement"]["ok"]
    assert {"value", "at_most", "at_least", "reached", "note", "part", "name"} == set(found["figures"][0])
    assert {"cpu", "cores", "threads", "memory_bytes", "versions"} <= set(found["machine"])
    assert found["settings"]["seed"] == 0
    for name in ("nnsight", "transformer_lens", "interp_engine"):
        if not found["peers"][name]["available"]:
            assert "make bench-peers" in found["peers"][name]["reason"]


def test_json_on_stdout_is_one_document(capsys) -> None:
    args = ["--model", TINY, "--parts", "grid", "--tokens", "1", "--repeat", "1", "--vectors", "1", "--device", "cpu"]
    assert app.run(["bench", *args, "--contestants", "ours,hooks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["contestants"]["grid, one token"]) == {"ours", "hooks"}
    ratio = found["contestants"]["grid, one token"]["hooks"]["ratio"]
    assert math.isclose(ratio, found["contestants"]["grid, one token"]["hooks"]["ratios"][0])


WRONG = [
    (("--tokens", "1,,2"), "as in 1,20"),
    (("--tokens", "0"), "at least 1"),
    (("--parts", "grdi"), "Did you mean 'grid'"),
    (("--contestants", "nnsihgt"), "Did you mean 'nnsight'"),
    (("--model", "llama:huge"), "llama:160m"),
    (("--peers-python", "nowhere/python"), "make bench-peers"),
    (("--device", "toaster"), "expected cpu"),
    (("--dtype", "bflaot16"), "Did you mean 'bfloat16'"),
    (("--repeat", "0"), "--repeat"),
]


@pytest.mark.parametrize(("args", "words"), WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_wrong_usage_is_told_before_anything_runs(capsys, monkeypatch, args, words) -> None:
    monkeypatch.setattr("patchscopes.bench.bench", lambda *_args, **_options: pytest.fail("ran"))
    assert app.run(["bench", *args]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err


def test_the_command_knows_the_names_of_the_benchmark() -> None:
    assert command.PARTS == benchmark.PARTS
    assert command.CONTESTANTS == benchmark.CONTESTANTS
