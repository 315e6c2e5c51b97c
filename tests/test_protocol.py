"""The paper's protocol: all tables in both presets, releases of data sets, other weights."""

import functools
import json
import re
from dataclasses import asdict, fields

import commands
import numpy as np
import pytest
import torch.nn.functional as F
from drawn import few_draws_of_theta, inputs_of, photo, write
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

import benchmark
import diffusion
import generate
from bench import control, downstream, factors, figure1, generated, leakage, pairs, remainder, sr
from bench.inputs import AS_PRINTED, SYNDIFF, Config, Inputs, resolved
from common import UserError
from common.files import find_photos
from common.runtime import print_once
from tests.tiny import CPU, config_of, save_net, untrained


def write_weights(path, as_printed=True, **changes):
    """A tiny untrained model."""
    changes = {"as_printed": as_printed, "widths": (8,), "attention": ()} | changes
    save_net(path, untrained(**changes), config_of(**changes) | {"began": "0"})


def write_pair(folder, number, hr, lr):
    image = photo(number, 129)
    write(folder / hr, image)
    small = Image.fromarray(image[:128, :128]).resize((32, 32), Image.Resampling.BOX)
    write(folder / lr, np.asarray(small))


def write_releases(folder):
    """RealSR, DRealSR and RealVSR as released: 2 pairs of Train and 4 of Test each at scale 4."""
    for part, count in (("Train", 2), ("Test", 4)):
        for i in range(count):
            number, name = i + 4 * (part == "Train"), f"Canon/{part}/4/Canon_00{i}"
            write_pair(folder / "set", number, f"{name}_HR.png", f"{name}_LR4.png")
            hr, lr = (f"{part}_x4/{part.lower()}_{kind}/P{i}_x" for kind in ("HR", "LR"))
            write_pair(folder / "set-2", number + 20, f"{hr}4.png", f"{lr}1.png")
            for kind, blurred in (("GT", 0), ("LQ", 1)):  # LR of the size of HR
                image = Image.fromarray(photo(number + 40, 128, 128))
                file = folder / f"set-3/{kind}_{part.lower()}/00{i}/00000.png"
                write(file, np.asarray(image.filter(ImageFilter.BoxBlur(blurred))))
        name = f"Canon/{part}/2/Canon_000"
        write_pair(folder / "set", 9, f"{name}_HR.png", f"{name}_LR2.png")


# What the tables of both presets share: the weights by their paths, and a measure that is slow.
loaded_once = functools.cache(generate.load_generator)
NETS, BANKS, TOLD = {}, {}, []
load, reductions, told_apart = diffusion.load, factors.reductions, remainder.told_apart


def net_once(state, name):
    NETS[name] = NETS.get(name) or load(state, name)
    return NETS[name]


def reduced_once(hr, *widths):
    key = hr.numpy().tobytes(), str(widths)
    BANKS[key] = BANKS[key] if key in BANKS else reductions(hr, *widths)
    return BANKS[key]


def told_once(*args):
    TOLD[:] = TOLD or [told_apart(*args)]
    return TOLD[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a release, photos, and tiny weights of every kind."""
    folder = tmp_path_factory.mktemp("protocol")
    write_releases(folder)
    for number in range(4):
        write(folder / f"data/lr/{number % 2}/{number}.png", photo(number + 5, 32))
    for number in range(2):
        write(folder / f"data/hr/{number}.png", photo(number, 128))
    write_weights(folder / "runs/diffusion/last.pt", as_printed=False)
    write_weights(folder / AS_PRINTED)
    write_weights(folder / SYNDIFF, without=("content", "degradation"))
    changes = (
        {"without": ("degradation",)},
        {"without": ("content",)},
        {"finetune_learning_rate": 0},
    )
    for (path, _), change in zip([*downstream.ABLATIONS.values()][:3], changes, strict=True):
        write_weights(folder / path, **change)
    return folder


@pytest.fixture
def small(monkeypatch, no_metric_weights):
    """Networks and tables in the smallest size."""
    tiny = lambda name, scale=4: sr.FSRCNN(scale, d=4, s=2, m=1)  # noqa: E731
    loss = lambda x, y, normalize: F.l1_loss(x, y)  # noqa: E731
    for module in (sr.metrics, downstream):
        monkeypatch.setattr(module, "perceptual_net", lambda *_: loss)
    monkeypatch.setattr(sr, "sr_network", tiny)
    monkeypatch.setattr(generate, "load_generator", loaded_once)
    for preset in ("paper", "smoke"):
        monkeypatch.setitem(sr.PRESETS, preset, {"batch_size": 2, "compile": False, "crop": 16})
    monkeypatch.setattr(diffusion, "load", net_once)
    monkeypatch.setattr(generate, "CANDIDATES", 2)
    few = generate.PRESETS["paper"] | {"candidates": 2}
    monkeypatch.setitem(generate.PRESETS, "paper", few)
    monkeypatch.setattr(downstream, "EVALUATIONS", 1)
    few_draws_of_theta(monkeypatch)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: path.touch())
    monkeypatch.setattr(factors, "FACTORS", {"blur": factors.FACTORS["blur"]})
    monkeypatch.setattr(factors, "LEVELS", 2)
    for module in (factors, generated):
        monkeypatch.setattr(module, "reductions", reduced_once)
    for name, values in {"BLURS": (0.3, 1.1), "NOISES": (0.0, 12.0), "GRID": GRID}.items():
        monkeypatch.setattr(figure1, name, values)
    monkeypatch.setattr(leakage, "SAMPLES", 2)
    monkeypatch.setattr(control, "KERNEL_NOISES", (0.0,))
    monkeypatch.setattr(remainder, "PROBE_STEPS", 2)
    monkeypatch.setattr(remainder, "told_apart", told_once)


SETS = ("set", "set-2", "set-3")  # RealSR, DRealSR, RealVSR
FLAGS = "--device cpu --pairs set set-2 set-3 --hr data/hr --lr data/lr --images 2 --crop 32"
GRID = [(0.3, 0.0), (1.1, 0.0), (0.3, 12.0), (1.1, 12.0)]  # of figure1
FLAGS += " --sr-steps 1 --data syndiff realdgen --num-steps 1 --candidates 1"


def psnr(x, y):
    return -10 * np.log10(((np.asarray(x, float) - np.asarray(y, float)) ** 2).mean() / 255**2)


@pytest.mark.parametrize(
    "names, kept, left_out",
    [
        (  # RealSR as released; HR and other scales once became references in silence
            ["Canon/Train/4/Canon_1_LR4", "Canon/Train/4/Canon_1_HR", "Canon/Train/2/Canon_1_LR2",
             "Canon/Train/2/Canon_1_HR", "Nikon/Test/4/Nikon_2_LR4", "Nikon/Test/4/Nikon_2_HR"],
            ["Canon/Train/4/Canon_1_LR4", "Nikon/Test/4/Nikon_2_LR4"], 4,
        ),
        (  # DRealSR
            ["Train_x4/train_LR/P1_x1", "Train_x4/train_HR/P1_x4", "Train_x3/train_LR/P1_x1",
             "Train_x3/train_HR/P1_x3", "Test_x4/test_LR/P2_x1", "Test_x4/test_HR/P2_x4"],
            ["Train_x4/train_LR/P1_x1", "Test_x4/test_LR/P2_x1"], 4,
        ),
        (["GT/a/1", "LQ/a/1"], ["LQ/a/1"], 1),
        (["1_LR2", "1_LR3", "1_LR4", "1_HR"], ["1_LR4"], 3),
        (["2/a", "4/a", "hr/a", "shrub_lr/a"], ["2/a", "4/a", "hr/a", "shrub_lr/a"], 0),  # cameras
        (["2/a_LR", "2/a_HR", "3/a"], ["2/a_LR", "3/a"], 1),
    ],
)  # fmt: skip
def test_lr_photos_of_a_release_are_lr_of_scale_4_alone(tmp_path, capsys, names, kept, left_out):
    for name in names:
        write(tmp_path / f"{name}.png", photo(0, 16))
    found = find_photos([str(tmp_path)], "lr", "--lr-ref")
    assert {f.relative_to(tmp_path).with_suffix("").as_posix() for f in found} == {*kept}
    line = f"--lr-ref {tmp_path}: left out {left_out} images that are HR or of another scale than 4"
    assert (line in capsys.readouterr().out) == (left_out > 0)
    assert len(find_photos([str(tmp_path)], "hr", "--hr")) == len(names)
    if (tmp_path / "GT").is_dir():  # folders that the user names are taken as they are
        assert len(find_photos([str(tmp_path / "GT"), str(tmp_path / "LQ")], "lr", "--lr")) == 2
    if (tmp_path / "1_HR.png").is_file():  # as the shell completes *
        files = [str(file) for file in tmp_path.iterdir()]
        assert find_photos(files, "lr", "--lr") == [tmp_path / "1_LR4.png"]


def test_test_of_a_release_is_tested_whole_and_train_gives_references(tmp_path, monkeypatch):
    """Of DRealSR, too, with the folder of another name; crops have halves."""
    for part, numbers in (("Train", "012"), ("Test", "34")):
        for i in numbers:
            hr, lr = (f"{part}_x4/{part.lower()}_{kind}/P{i}_x" for kind in ("HR", "LR"))
            write_pair(tmp_path / "released", int(i), f"{hr}4.png", f"{lr}1.png")
            crop = f"P{i}_x1.png"
            write_pair(tmp_path / "DRealSR", int(i), f"test_HR/{crop}", f"test_LR/{crop}")
    folders = tuple(str(tmp_path / name) for name in ("released", "DRealSR"))
    inputs = inputs_of(pairs=folders)
    split = {"released": (["P0", "P1", "P2"], ["P3", "P4"])}
    split["DRealSR"] = ["P0_x1", "P2_x1", "P4_x1"], ["P1_x1", "P3_x1"]
    for name, (train, tests) in split.items():
        assert [pair.name for pair in inputs.train[name]] == train
        assert [pair.name for pair in inputs.tests[name]] == tests
    assert [inputs.sets[name][0].release for name in split] == ["DRealSR", ""]
    assert inputs.split_text().splitlines() == [
        "released: references are of Train (3), tested are all of Test (2).",
        "DRealSR: references are of every other scene (3), tested are the others (2).",
    ]
    downstream.write_references(inputs.train, tmp_path / "out")
    written = sorted((tmp_path / "out/references/released/P").iterdir())
    files = [tmp_path / f"released/Train_x4/train_LR/P{i}_x1.png" for i in range(3)]
    assert [f.read_bytes() for f in written] == [f.read_bytes() for f in files]
    # The same in the tables that compare LR.
    other = inputs.other_scenes()
    assert all({*pair.others} == {*files} for pair in other["released"])
    assert all(pair.reference != pair.lr for pair in other["DRealSR"])
    assert [len(other[name]) for name in split] == [2, 5]


def test_of_realvsr_200_random_frames_are_taken_and_a_video_is_in_one_half(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "FRAMES", 9)
    for video in range(4):
        for frame in range(6):
            name = f"00{video}/0000{frame}.png"
            for kind in ("GT", "LQ"):
                write(tmp_path / f"{kind}_test/{name}", photo(video, 128, 128))
    found, skipped = pairs.find_pairs(tmp_path)
    assert len(found) == 9 and skipped == 0 and found == pairs.find_pairs(tmp_path)[0]
    assert len({pair.name[-1] for pair in found}) > 3, "not the first frames alone"
    train, tests = ({pair.scene for pair in half} for half in pairs.halves(found))
    assert train | tests == {f"00{video}" for video in range(4)} and not train & tests


@pytest.mark.parametrize("preset", benchmark.PRESETS)
def test_every_table_runs(workplace, small, preset, monkeypatch):
    """Each table passes its checks alone; then all are made by one command."""
    monkeypatch.chdir(workplace)
    for name in benchmark.TABLES:
        flags = benchmark.PRESETS[preset] | {"table": (name,), "crop": 32}
        inputs = inputs_of(pairs=SETS, hr=("data/hr",), lr=("data/lr",), **flags)
        assert callable(benchmark.TABLES[name](name, inputs))
    flags = f"--preset {preset} {FLAGS} --out {preset}"
    done = commands.run("benchmark.py", *flags.split(), "--table", *benchmark.TABLES, cwd=workplace)
    assert done.returncode == 0, done.stderr
    results = json.loads((workplace / preset / "results.json").read_text())["tables"]
    assert set(results) == set(benchmark.TABLES)
    text = {name: (workplace / preset / f"{benchmark.stem_of(name)}.md").read_text()
            for name in results}  # fmt: skip
    assert "nan" not in " ".join(text.values())
    assert "is left out" not in " ".join(text.values())
    values = {name: table["values"] for name, table in results.items()}
    # Rows with other weights.
    for name in SETS:
        methods = {row["method"]: row["n"] for row in values["2"][name]}
        printed = "RealDGen as printed"
        assert {"SynDiff", f"{printed}, own LR", f"{printed}, other scene"} < set(methods)
        assert f"{printed}, all other scenes" not in methods and {*methods.values()} == {4}
        assert [row["method"] for row in values["6"][name]][2:] == ["SynDiff"]
    assert {"SynDiff", "RealDGen as printed"} < set(values["control"]["rows"])
    assert "SynDiff" in values["figure1"]["labels"]
    assert [row["lr"] for row in values["factors"]["rows"]][-1] == "as printed"
    tasks = [row["task"] for row in values["extractors"]["retrieval"]]
    assert tasks == ["theta, realesrgan", "theta, camera", "device"]
    labels = {table: [row["label"] for row in values[table]["rows"][1:]] for table in "34"}
    assert labels == {"3": ["T=200", "T=300", "T=400", "T=500"], "4": [*downstream.ABLATIONS]}
    networks = {row["network"] for row in values["1"]["rows"][1:]}
    paper = {"swinir", "rrdb", "hat", "swinir-l"}
    assert networks == (paper if preset == "paper" else {"fsrcnn"})
    losses = {row["perceptual"] for row in values["1"]["rows"]}
    assert losses == ({False, True} if preset == "paper" else {False})
    # Train gives references, Test is tested whole. Two rows, computed from the files.
    assert values["control"]["trained"] == dict.fromkeys(SETS, 2)
    assert values["1"]["tested"] == dict.fromkeys(SETS, 4)
    for name in SETS:
        assert f"{name}: references are of Train (2), tested are all of Test (4)." in text["1"]
    reduced, enlarged = [], []
    for i in range(4):
        hr, lr = (Image.open(workplace / f"set/Canon/Test/4/Canon_00{i}_{kind}.png")
                  for kind in ("HR", "LR4"))  # fmt: skip
        hr = hr.crop((0, 0, 128, 128))
        reduced.append(psnr(hr.resize((32, 32), Image.Resampling.BICUBIC), lr))
        enlarged.append(psnr(lr.resize((128, 128), Image.Resampling.BICUBIC), hr))
    bicubic = next(row for row in values["2"]["set"] if row["method"] == "bicubic")
    assert bicubic["n"] == 4 and "other scenes (mean F_deg), of Train (2)." in text["2"]
    assert bicubic["mean"]["PSNR RGB"] == pytest.approx(np.mean(reduced), abs=1e-4)
    found = values["1"]["rows"][0]["runs"][0]["set"]["mean"]["PSNR RGB"]
    assert found == pytest.approx(np.mean(enlarged), abs=0.01)
    # The paper's figures stand where the layout is that of a release, under Tables 1 and 2 alone.
    assert "RealDGen (paper), on Test of RealSR: PSNR 26.16" in text["2"]
    in_brackets = {name: text[name].count("[") for name in "13457"}
    values_of_paper = {"1": 2 * 4 * 8, "5": 2 * 2} if preset == "paper" else {}
    assert in_brackets == dict.fromkeys("13457", 0) | values_of_paper
    if preset == "paper":
        assert "[26.140]" in text["1"] and "[28.802]" in text["1"] and "[22.9616]" in text["5"]


def test_weights_as_printed_are_sampled_as_printed_unless_a_flag_says_else(
    workplace, tmp_path, monkeypatch
):
    """A plain generate.py once ended in an error about --no-grain."""
    monkeypatch.setitem(generate.PRESETS, "paper", generate.PRESETS["paper"] | {"num_steps": 3})
    sentence = f"{AS_PRINTED}: trained as printed, so the sampler is that of --preset paper"
    weights = f"--device cpu --checkpoint {AS_PRINTED} --hr data/hr --lr-ref data/lr --out"

    def settings(*flags):
        out = tmp_path / f"out{len(flags)}"
        done = commands.run("generate.py", *weights.split(), out, *flags, cwd=workplace)
        assert done.returncode == 0, done.stderr
        row = json.loads((out / "pairs.jsonl").read_text().splitlines()[0])
        return {f.name: row[f.name] for f in fields(generate.Sampler)}, sentence in done.stdout

    print_once.cache_clear()
    assert settings() == (asdict(generate.Sampler(**generate.PRESETS["paper"])), True)
    print_once.cache_clear()
    given, said = settings("--no-grain", "--seed", "1")
    assert not said and given["start"] == "reconstruct"
    assert given["num_steps"] == generate.Sampler.num_steps
    print_once.cache_clear()
    given, said = settings("--preset", "paper", "--t-start", "9")
    assert not said and given["t_start"] == 9 and given["start"] == "realesrgan"
    bad = commands.run("generate.py", *weights.split(), tmp_path, "--t-start", 9, cwd=workplace)
    commands.assert_refused(bad, f"{AS_PRINTED}: E_deg as printed", "--preset paper, or --no-grain")
    # The benchmark takes such weights alike; weights of another kind keep the sampler.
    monkeypatch.chdir(workplace)
    common = {"pairs": ("set",), "hr": ("data/hr",), "device": "cpu"}
    inputs = Inputs(resolved(Config(checkpoint=str(AS_PRINTED), **common), CPU), CPU)
    assert inputs.sampler == generate.Sampler(**generate.PRESETS["paper"])
    assert Inputs(resolved(Config(**common), CPU), CPU).sampler == generate.Sampler()


def test_rows_of_table_4_differ_in_nothing_but_the_ablation(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    downstream.check_ablations()
    path = downstream.ABLATIONS["without E_deg"][0]
    kept = path.read_bytes()
    for changes, words in (
        ({"widths": (8, 8)}, "trained with different widths"),
        ({"as_printed": False}, "not as printed: train it with --preset as-printed"),
    ):
        write_weights(path, **{"without": ("degradation",)} | changes)
        with pytest.raises(UserError, match=words):
            downstream.check_ablations()
    path.write_bytes(kept)


def test_a_training_says_how_long_it_takes_and_a_short_one_that_it_means_nothing(
    workplace, small, capsys, monkeypatch
):
    assert sr.duration({3: 10.0, 4: 11.0, 5: 14.0}, 65) == "about 2 min for the other 60 steps"
    assert sr.duration({1: 0.0, 2: 2.0}, 5402) == "about 3 h for the other 5400 steps"
    flags = "--device cpu --pairs set set-2 set-3 --hr data/hr --data realesrgan --out swinir"
    flags += " --sr swinir --sr-steps 20"
    done = commands.run("benchmark.py", *flags.split(), cwd=workplace)
    assert done.returncode == 0, done.stderr
    plan = "table 1: trainings of each network: 1 (swinir 20 steps)"
    offer = "the figures of swinir mean nothing. On a CPU give --sr fsrcnn --sr-steps 2000"
    printed = done.stdout
    assert (
        printed.index(plan) < printed.index(offer) < printed.index("sr/swinir-realesrgan-0-20 1/20")
    )
    estimate = re.search(r"swinir-realesrgan-0-20: about .* s for the other 14 steps", printed)
    assert estimate and estimate.start() < printed.index("sr/swinir-realesrgan-0-20 7/20")
    table = (workplace / "swinir/table1.md").read_text()
    assert "| swinir | Real-ESRGAN (only 20 steps: means nothing) |" in table and offer in table
    enough = Config(sr=("swinir",), sr_preset="small", sr_steps=downstream.LEAST_STEPS)
    assert downstream.meaningless("swinir", enough) == ""
