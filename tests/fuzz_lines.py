"""Random command lines for every command: valid ones, broken ones, and what lies between.

A line follows from a seed and its number alone, so that one line of ten thousand can be repeated.
Paths are those of the folder that `fuzz_runner.prepare` makes.
"""

import functools
import random
from collections.abc import Callable, Sequence

from cifar_lab.__main__ import COMMANDS
from cifar_lab.config.groups import find_options, setting_keys

TINY = (
    *("dataset=digits", "model.widths=[4,8]", "model.hidden=16", "figures=none", "device=cpu"),
    *("split.validation=1300", "training.batch_size=64", "training.epochs=1", "threads=1"),
)
"""A run of a fraction of a second: 137 training images, one epoch."""

NUMBERS = (
    *("0", "1", "-1", "2", "3", "-0.0", "0.5", "1e-8", "1.5", "1e400", "-1e400", "nan", "inf"),
    *("-inf", "1e30", "1e-400", "9" * 25, "9" * 400, "-" + "9" * 5000, "0x1F", "1_0", "1e", "٣"),
    *("4294967296", "2147483648", "9223372036854775808", "0.1.2", "+1", "1/3", "00"),
)
WORDS = (
    *("", "''", '""', "null", "true", "false", "none", "None", "yes", "auto", "abc", "SGD", "cpu"),
    *("ü", "日本", "👾", "a b", " ", '"', "'", "\\", "\\'", "$x", "${seed}", "${nope}", "${"),
    *("${oc.env:HOME}", "${oc.env:NOPE}", "${eval:1}", "${..seed}", "${hydra:runtime}", "???"),
    *("~", "@x", "x@y", "#c", "!x", "!!python/name:os.system", "*", "?", "%s", "%(seed)s", "{}"),
    *("{a:1}", "{a:{b:[1,{c:2}]}}", "{a:", "[", "]", "[]", "[1,2]", "[1,", "[3,32,32]", "()"),
    *("(1)", "a=b", "=", "\t", "\n", "a\nb", "a\r\nb", "\x1b[31m", "\u202e", "\udcff", ",", ":"),
    *("-", "--", "-m", "+", "x" * 300, "x" * 5000, "ü" * 200, "[" * 200, "[" * 3000, "{a:" * 300),
    *("{_target_:os.system}", "{_target_:torch.nn.Identity}", "torch.nn.Identity", "os.system"),
)
SWEEPS = (
    *("1,2", "0,1,2", "a,b", "null,1", ",", "1,", "range(3)", "range(0,3)", "range(0,3,0)"),
    *("range(0,inf)", "range(0,1e9)", "range(3,0)", "range(0,1,0.1)", "range(nan,1)", "range()"),
    *("range(0,2,1e-9)", "range(a,b)", "interval(0,1)", "interval(1,0)", "interval(0,inf)"),
    *("interval(1,1)", "interval(0)", "glob(*)", "glob(nope*)", "glob([c*,t*])", "glob(*,x)"),
    *("choice(1,2)", "choice()", "choice(a)", "shuffle(1,2)", "shuffle(range(0,1000000000))"),
    *("sort(2,1)", "sort(2,1,reverse=true)", "tag(log,interval(1e-4,1e-1))", "tag(interval(0,1))"),
    *("tag(log,interval(0,1))", "tag(log,choice(1,2))", "int(3.5)", "int(x)", "float(x)", "str(3)"),
    *("bool(maybe)", "json_str({a:1})", "extend_list(1)", "nope(1)", "range(1", "choice(1,2"),
    *("choice({a:1},{b:2})", "[1,2],[3]", "int(choice(1.5,2.5))", "str(range(0,3))"),
)
PATHS = (
    *("", " ", ".", "..", "/", "./run", "run", "run/", "run//", "{root}/run", "stopped", "queued"),
    *("group", "empty", "pictures", "file.txt", "picture.png", "broken.png", "huge.png", "fifo"),
    *("link", "loop", "nowhere", "nowhere/x", "file.txt/x", "run/best.pt", "run/figures"),
    *("run/config.yaml", "conf", "x" * 300, "x" * 5000, "a/" * 2000, "ü" * 200, "ü.png", "a b"),
    *("/dev/null", "/dev/zero", "/dev/full", "/dev/stdin", "/dev/fd/99", "/proc/self/mem"),
    *("/proc/nope", "/etc/passwd", "~", "~nobody/x", "a\nb", "a\x00b", "\udcff", "run=x", "new"),
    *("x.yaml", "x.png", "x.json", "x.md", "x.PNG", "x.", ".png", "-", "{}", "%s", "new/x.png"),
    *("new/a/b/x.md", "run/summary.json", "pictures/cat", "run/x.onnx", "run.npz", "deep.yaml"),
    *("pictures.png", "http://localhost/x", "file:///etc/passwd", "con", "../../../../nope/x"),
)
DEVICES = ("cpu", "auto", "cuda", "cuda:0", "cuda:99", "mps", "meta", "gpu", "CPU", "", "xla", "-1")
HYDRA = (
    *(["--cfg", "job"], ["--cfg", "all"], ["--cfg", "hydra"], ["--cfg"], ["--cfg=job"], ["-c"]),
    *(["--cfg", "job", "--resolve"], ["--cfg", "job", "--package", "seed"], ["--resolve"]),
    *(["--cfg", "job", "--package", "a..b"], ["--cfg", "job", "-p", ""], ["--package", "seed"]),
    *(["--cfg", "job", "-p", "model.widths[0]"], ["--cfg", "job", "-p", "_global_"], ["--info"]),
    *(["--info", "config"], ["--info", "all"], ["--info", "defaults-tree"], ["-i", "plugins"]),
    *(["--hydra-help"], ["--run"], ["-r"], ["-m"], ["--multirun"], ["--multirun=1"], ["-mm"]),
    *(
        ["-sc", "x"],
        ["-sc", "install=bash"],
        ["-sc", "install=tcsh"],
        ["-sc"],
        ["-sc", "query=zsh"],
    ),
    *(["--shell-completion", "uninstall=fish"], ["--experimental-rerun", "run"], ["-cp", "conf"]),
    *(["--config-path", "conf"], ["--config-dir", "conf"], ["--config-dir", "nowhere"], ["-cd"]),
    *(["--config-dir", "file.txt"], ["--config-dir", "broken_conf"], ["--config-dir", ""]),
    *(
        ["--config-name", "config"],
        ["--config-name", "nope"],
        ["-cn", ""],
        ["-cn", "model/convnet"],
    ),
    *(["--config-name", "../x"], ["--config-name", "mine", "-cd", "conf"], ["--version"], ["--"]),
    *(["--help"], ["-h"], ["--hepl"], ["--lr", "0.1"], ["--lr=0.1"], ["-x"], ["-"], ["--epochs"]),
    *(["hydra.run.dir=x"], ["hydra.mode=MULTIRUN"], ["hydra/launcher=basic"], ["hydra.verbose=1"]),
    *(["hydra/launcher=nope"], ["hydra/launcher=submitit_slurm"], ["hydra/sweeper=optuna"]),
    *(
        ["hydra.launcher=null"],
        ["hydra.launcher.x=1"],
        ["hydra.launcher.timeout_min=x"],
        ["hydra=x"],
    ),
    *(["hydra/job_logging=none"], ["hydra.sweeper.params={seed: 1}"], ["+hydra.x=1"], ["~hydra"]),
    *(["hydra.searchpath=[file://nope]"], ["--config-dir", "conf", "model=mine"]),
)
"""Flags and settings of Hydra, ours and others."""

OUTPUT_OPTIONS = (
    *(["compare", "run", "group/other", "--embed", "pca", "--to"], ["summarize"], ["evaluate"]),
    *(["evaluate", "run", "--side-by-side"], ["export", "run", "--format", "pt2", "--output"]),
    *(["predict", "run"], ["reproduce", "S3", "--dry-run", "--markdown"], ["describe", "--figure"]),
    *(["benchmark", "--json"], ["reproduce", "S3", "--dry-run", "--keep"], ["compare", "run"]),
)
BAD_PATHS = ("", "fifo", "file.txt/x.png", "/dev/full", "loop", "a\x00b", "x" * 300)
DIRECTED = (
    *([*words, path] for words in OUTPUT_OPTIONS for path in BAD_PATHS),
    *(["evaluate", "run", "--device", name] for name in ("meta", "gpu", "cuda:99")),
    *(["evaluate", "run", name] for name in ("queued", "nowhere", "empty")),
    *(
        ["export", "run", "--format=pt2", "--output", "/proc/x.pt2"],
        ["export", "run", "--format=--"],
    ),
    *(["evaluate", "queued"], ["evaluate", "run", "--probabilities", "-1"]),
    *(["summarize", "queued", "--embed", "pca"], ["compare", "run", "queued", "--embed", "pca"]),
    *(["describe", *TINY, "--images", images] for images in ("a", "99999", "-1", "9" * 400)),
    *(["train", *TINY, f"split.validation={count}"] for count in ("1436", "1437", "0.9999")),
    *(["train", *TINY, f"dataset.image_shape=[{n},4096,4096]"] for n in (1, 3)),
    *(["train", "dataset=npz", f"dataset.source.path={p}"] for p in ("~nobody/x", "fifo", "loop")),
    *(["train", "dataset=image_folder", f"dataset.source.path={p}"] for p in ("~nobody/x", "fifo")),
)
"""Lines that once ended in a traceback, waited forever, or wrote before they were refused."""

Words = list[str]


class Generator:
    """Makes the lines of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.keys = setting_keys()
        self.options = {group: sorted(options) for group, options in find_options().items()}

    def line(self, number: int) -> Words:
        """Return a command and its arguments."""
        chance = random.Random(f"{self.seed}:{number}")
        # train has the most to say; every other command is as probable as the next
        command = chance.choice([*COMMANDS, "train", "train", "train", "train", "train"])
        makers: dict[str, Callable[[random.Random], Words]] = {
            "train": self._train,
            "describe": self._describe,
            "benchmark": self._benchmark,
            "prove_resume": self._prove,
            "reproduce": self._reproduce,
        }
        make = makers.get(command, functools.partial(self._reader, command))
        words = make(chance)
        if chance.random() < 0.15:
            _mangle(chance, words)
        return [command, *words]

    def _train(self, chance: random.Random) -> Words:
        words = self._overrides(chance)
        kind = chance.random()
        if kind < 0.15:  # a past run, and what may follow it
            words = [chance.choice(PATHS), *words[: chance.randrange(3)]]
        elif kind < 0.4:
            words += chance.choice(HYDRA)
            if chance.random() < 0.3:
                words += chance.choice(HYDRA)
        if chance.random() < 0.3:
            words = self._swept(chance, words)
        # a sweep that runs has processes of its own; of single runs some are trained
        is_many = any(word.startswith(("-m", "--multi", "experiment", "hydra")) for word in words)
        if is_many or chance.random() < 0.75:
            words.append(chance.choice(("plan=true", "plan=true", "--cfg=job")))
        return words

    def _swept(self, chance: random.Random, words: Words) -> Words:
        keys = chance.sample((*self.keys, "seed", "model", "optimizer.lr"), chance.randint(1, 2))
        words = [*words, *(f"{key}={chance.choice(SWEEPS)}" for key in keys)]
        if chance.random() < 0.8:
            words.append("-m")
        if chance.random() < 0.3:
            words.append("search=optuna")
            if chance.random() < 0.4:
                key = chance.choice(("study", "trials", "sampler", "pruner", "seed", "method"))
                words.append(f"search.{key}={self._value(chance)}")
        return words

    def _overrides(self, chance: random.Random) -> Words:
        """Return most of a tiny run's settings, and some others that may be wrong."""
        words = [word for word in TINY if chance.random() > 0.04]
        for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 5))):
            word = self._override(chance)
            words.insert(chance.randint(0, len(words)), word)
            if chance.random() < 0.08:
                words.append(word)  # twice
        return words

    def _override(self, chance: random.Random) -> str:
        kind = chance.random()
        if kind < 0.25:
            group = chance.choice(sorted(self.options))
            option = chance.choice((*self.options[group], "nope", "", "null", *WORDS[:9]))
            return f"{group}={option}"
        key = chance.choice(self.keys)
        if kind < 0.4:
            key = _broken_key(chance, key)
        return f"{key}={self._value(chance)}"

    def _value(self, chance: random.Random) -> str:
        pool: Sequence[str] = chance.choice((NUMBERS, NUMBERS, WORDS, WORDS, PATHS, SWEEPS))
        return chance.choice(pool)

    def _reader(self, command: str, chance: random.Random) -> Words:
        """Return a line for a command that takes run folders."""
        options: dict[str, dict[str, Sequence[str]]] = {
            "evaluate": {"--probabilities": NUMBERS, "--side-by-side": PATHS, "--device": DEVICES},
            "predict": {
                "--top": NUMBERS,
                "--weights": ("best", "last", "x", ""),
                "--fit": ("crop", "resize", "pad", "x"),
                "--device": DEVICES,
            },
            "export": {
                "--format": ("safetensors", "pt2", "onnx", "x", ""),
                "--output": PATHS,
                "--overwrite": (),
            },
            "summarize": {
                "--metric": ("test_accuracy", "seconds", "nope", "", "status", *WORDS),
                "--embed": ("pca", "tsne", "x"),
                "--timing": (),
                "--test": (),
            },
            "compare": {"--embed": ("pca", "tsne", "x"), "--to": PATHS},
        }
        known = options.get(command, {}) | {"--trust": WORDS}
        folders = 2 if command in ("compare", "predict") else 1
        if chance.random() < 0.15:
            folders += chance.choice((-1, 1))
        good = {"summarize": ["group", "group", "."], "compare": ["run", "run", "group/other"]}
        words = []
        for place in range(folders):
            pool = good.get(command, ["run"])
            if command == "predict" and place:
                pool = ["picture.png", "pictures", "pictures/cat"]
            words.append(chance.choice(pool if chance.random() < 0.55 else PATHS))
        if command == "export":
            # the exporters take seconds each: mostly refused before
            words += ["--format", chance.choice(("safetensors",) * 5 + ("x", "pt2"))]
        for _ in range(chance.choice((0, 1, 1, 2))):
            words += _option(chance, known)
        chance.shuffle(words) if chance.random() < 0.05 else None
        return words

    def _describe(self, chance: random.Random) -> Words:
        known: dict[str, Sequence[str]] = {
            "--figure": PATHS,
            "--images": ("1", "1,2", "-1", "1797", "a", "", ",", "9" * 400, "1.5", "1," * 200),
            "--settings": ("", "training", "optimizer.lr", "nope", *WORDS),
            "--schema": (),
        }
        return self._with_options(chance, known)

    def _benchmark(self, chance: random.Random) -> Words:
        known: dict[str, Sequence[str]] = {
            "--json": PATHS,
            "--figure": PATHS,
            "--seconds": ("0.1", "0", "-1", "nan", "inf", "1e400", "abc", "", "9" * 400),
            "--only": ("epoch", "bound", "data", "nope", "", ",", "epoch,nope", "matmul"),
        }
        return [*self._with_options(chance, known), "--seconds=0.1"]

    def _prove(self, chance: random.Random) -> Words:
        counts = ("1", "0", "-1", "1001", "nan", "abc", "", "9" * 400, "1.5")
        return [*self._with_options(chance, {"--stops": counts, "--seed": NUMBERS}), "--stops=1"]

    def _reproduce(self, chance: random.Random) -> Words:
        known: dict[str, Sequence[str]] = {
            "--seeds": NUMBERS,
            "--only": ("S3", "nope", "", *WORDS),
            "--protocol": ("report", "sound", "both", "x"),
            "--device": DEVICES,
            "--jobs": (*NUMBERS, "auto"),
            "--output-dir": PATHS,
            "--keep": PATHS,
            "--markdown": PATHS,
            "--list": (),
            "--smoke": (),
            "--accept-code": (),
        }
        reports = ("S0", "S1", "S3", "S4", "all", "s3_learning_rate", "S9", "smoke", *WORDS)
        words = [chance.choice(reports)] if chance.random() < 0.9 else []
        for _ in range(chance.choice((0, 1, 1, 2, 3))):
            words += _option(chance, known)
        return [*words, chance.choice(("--dry-run", "--dry-run", "--list"))]

    def _with_options(self, chance: random.Random, known: dict[str, Sequence[str]]) -> Words:
        words = self._overrides(chance)
        for _ in range(chance.choice((0, 1, 1, 2))):
            words += _option(chance, known)
        if chance.random() < 0.2:
            words += chance.choice(HYDRA)
        if chance.random() < 0.1:
            words = self._swept(chance, words)
        return words


def _option(chance: random.Random, known: dict[str, Sequence[str]]) -> Words:
    name = chance.choice(sorted(known))
    if not known[name]:
        return [name]
    value = chance.choice(known[name])
    return [f"{name}={value}"] if chance.random() < 0.3 else [name, value]


def _broken_key(chance: random.Random, key: str) -> str:
    ways: tuple[Callable[[], str], ...] = (
        lambda: key[:-1],
        lambda: key + "x",
        lambda: key.upper(),
        lambda: key.replace(".", "..", 1),
        lambda: key.replace(".", "/"),
        lambda: f"+{key}",
        lambda: f"++{key}",
        lambda: f"~{key}",
        lambda: f"{key}.x",
        lambda: f"{key}[0]",
        lambda: f"{key}@x",
        lambda: f"{key}@a:b",
        lambda: f".{key}",
        lambda: f"{key}.",
        lambda: key.rpartition(".")[2],
        lambda: f"{key}._target_",
        lambda: f"+{key}.new",
        lambda: f" {key}",
        lambda: f"{key} ",
        lambda: f"choices.{key}",
        lambda: f"study.{key}",
        lambda: f"protocols.sound.{key}",
        lambda: f"+figures.{key}",
        lambda: "x" * 400,
        lambda: "ü",
        lambda: "",
        lambda: ".".join("a" * 1000),
    )
    return chance.choice(ways)()


def _mangle(chance: random.Random, words: Words) -> None:
    """Break a line as a slip of the hand would."""
    if not words:
        return
    place = chance.randrange(len(words))
    word = words[place]
    slips: tuple[Callable[[], Words], ...] = (
        list,
        lambda: [word, word],
        lambda: [word.replace("=", " = ")],
        lambda: word.split("=", 1),
        lambda: [f"--{word}"],
        lambda: [word, chance.choice(WORDS)],
        lambda: [word, chance.choice(PATHS)],
        lambda: [chance.choice(WORDS), word],
        lambda: [word + chance.choice(WORDS)],
        lambda: [word[: len(word) // 2]],
        lambda: [word.replace("=", "==")],
        lambda: [word, "--"],
        lambda: ["--", word],
    )
    words[place : place + 1] = chance.choice(slips)()
