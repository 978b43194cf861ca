"""Random command lines for every command: valid ones, broken ones, and what lies between.

A line follows from a seed and its number alone, so that one line of ten thousand can be repeated.
Paths are those of the folder that `fuzz_runner.prepare` makes.
"""

import random
from collections.abc import Sequence

from cifar_lab.__main__ import COMMANDS
from cifar_lab.config.command_line import find_options, setting_keys


def listed(text: str) -> list[str]:
    """Return the words of a text: a list of many short ones is easier to read in this way."""
    return text.split()


TINY = (
    *("dataset=digits", "model.widths=[4,8]", "model.hidden=16", "figures=none", "device=cpu"),
    *("split.validation=1300", "training.batch_size=64", "training.epochs=1", "threads=1"),
)
"""A run of a fraction of a second: 137 training images, one epoch."""

NUMBERS = (
    *listed("0 1 -1 2 3 -0.0 0.5 1e-8 1.5 1e400 -1e400 nan inf -inf 1e30 1e-400 0x1F 1_0 1e ٣ 00"),
    *listed("4294967296 2147483648 9223372036854775808 0.1.2 +1 1/3"),
    *("9" * 25, "9" * 400, "-" + "9" * 5000),
)
WORDS = (
    *("''", '""', '"', "'", "\\", "\\'"),
    *listed("null true false none None yes auto abc SGD cpu ü 日本 👾 $x ${seed} ${nope} ${"),
    *listed("${oc.env:HOME} ${oc.env:NOPE} ${eval:1} ${..seed} ${hydra:runtime} ??? ~ @x"),
    *listed("x@y #c !x !!python/name:os.system * ? %s %(seed)s {} {a:1} {a:{b:[1,{c:2}]}} {a: [ ]"),
    *listed("[] [1,2] [1, [3,32,32] () (1) a=b = , : - -- -m + torch.nn.Identity os.system"),
    *listed("{_target_:os.system} {_target_:torch.nn.Identity}"),
    *("", "a b", " ", "\t", "\n", "a\nb", "a\r\nb", "\x1b[31m", "\u202e", "\udcff"),
    *("x" * 300, "x" * 5000, "ü" * 200, "[" * 200, "[" * 3000, "{a:" * 300),
)
SWEEPS = (
    *listed("1,2 0,1,2 a,b null,1 , 1, range(3) range(0,3) range(0,3,0) range(0,inf) range(0,1e9)"),
    *listed("range(3,0) range(0,1,0.1) range(nan,1) range() range(0,2,1e-9) range(a,b) range(1"),
    *listed("interval(0,1) interval(1,0) interval(0,inf) interval(1,1) interval(0) glob(*)"),
    *listed("glob(nope*) glob([c*,t*]) glob(*,x) choice(1,2) choice() choice(a) choice(1,2"),
    *listed("shuffle(1,2) shuffle(range(0,1000000000)) sort(2,1) sort(2,1,reverse=true)"),
    *listed("tag(log,interval(1e-4,1e-1)) tag(interval(0,1)) tag(log,interval(0,1))"),
    *listed("tag(log,choice(1,2)) int(3.5) int(x) float(x) str(3) bool(maybe) json_str({a:1})"),
    *listed("extend_list(1) nope(1) choice({a:1},{b:2}) [1,2],[3] int(choice(1.5,2.5))"),
)
PATHS = (
    *listed(". .. /etc ./run run run/ run// {root}/run stopped queued group empty pictures"),
    "file.txt",
    *listed("picture.png broken.png huge.png link loop nowhere nowhere/x file.txt/x run/best.pt"),
    *listed("run/figures run/config.yaml conf ü.png /dev/null /dev/full /dev/fd/99 /proc/self/mem"),
    *listed("/proc/nope /etc/passwd ~ ~nobody/x run=x new x.yaml x.png x.json x.md x.PNG x. .png"),
    *listed("- {} %s new/x.png new/a/b/x.md run/summary.json pictures/cat run/x.onnx run.npz"),
    *listed("deep.yaml pictures.png http://localhost/x file:///etc/passwd ../../../../nope/x"),
    *("", " ", "a b", "x" * 300, "x" * 5000, "a/" * 150, "ü" * 200, "a\nb", "a\x00b", "\udcff"),
)
DEVICES = ("cpu", "auto", "cuda", "cuda:0", "cuda:99", "mps", "meta", "gpu", "CPU", "", "xla", "-1")
HYDRA = [
    line.split()
    for line in """
    --cfg job|--cfg all|--cfg hydra|--cfg|--cfg=job|-c|--cfg job --resolve|--package seed
    --cfg job -p _global_|--info|--info config|--info all|--info defaults-tree|-i plugins
    --hydra-help|--run|-r|-m|--multirun|--multirun=1|-mm|-sc x|-sc install=bash|-sc install=tcsh
    -sc|-sc query=zsh|--shell-completion uninstall=fish|--experimental-rerun run|-cp conf
    --config-path conf|--config-dir conf|--config-dir nowhere|-cd|--config-dir file.txt
    --config-dir broken_conf|--config-name config|--version|--|--help|-h|--hepl|--lr 0.1|--lr=0.1
    -x|-|--epochs|hydra.run.dir=x|hydra.mode=MULTIRUN|hydra/launcher=basic|hydra.verbose=1
    hydra/launcher=nope|hydra/sweeper=optuna|hydra.launcher=null|hydra.launcher.x=1|hydra=x
    hydra.launcher.timeout_min=x|hydra/job_logging=none|+hydra.x=1|~hydra
    hydra.searchpath=[file://nope]|--config-dir conf model=mine
    """.replace("\n", "|").split("|")
    if line.strip()
]
"""Flags and settings of Hydra, ours and others."""


Words = list[str]
Options = dict[str, Sequence[str]]

OPTIONS: dict[str, Options] = {
    "evaluate": {"--probabilities": NUMBERS, "--side-by-side": PATHS, "--device": DEVICES},
    "predict": {"--top": NUMBERS, "--fit": ("crop", "resize", "pad", "x"), "--device": DEVICES},
    "export": {"--format": ("safetensors", "onnx", "x", ""), "--output": PATHS, "--overwrite": ()},
    "summarize": {
        "--metric": ("test_accuracy", "seconds", "nope", "", "status", *WORDS),
        "--detect": NUMBERS,
        "--baseline": ("seed=1", "optimizer=adam", *WORDS),
        "--latex": PATHS,
        "--test": (),
    },
    "compare": {"--in": PATHS},
    "draw": {"--format": ("svg", "x", ""), "--dpi": NUMBERS, "--width": NUMBERS, "--labels": PATHS},
    "describe": {
        "--figure": PATHS,
        "--images": ("1", "1,2", "-1", "1797", "a", "", ",", "9" * 400, "1.5", "1," * 200),
        "--settings": ("", "training", "optimizer.lr", "nope", *WORDS),
    },
    "benchmark": {
        "--json": PATHS,
        "--seconds": ("0.1", "0", "-1", "nan", "inf", "1e400", "abc", "", "9" * 400),
    },
    "prove_resume": {"--stops": ("0", "-1", "1001", "nan", "abc", "9" * 400), "--seed": NUMBERS},
    "reproduce": {
        "--seeds": NUMBERS,
        "--only": ("S3", "nope", "", *WORDS),
        "--protocol": ("report", "sound", "both", "x"),
        "--device": DEVICES,
        "--jobs": (*NUMBERS, "auto"),
        "--output-dir": PATHS,
        "--accept-code": (),
    },
}
ALWAYS = {"benchmark": "--seconds=0.1", "prove_resume": "--stops=1", "reproduce": "--dry-run"}
"""What keeps a line short, at its end."""
PLACES = {
    "summarize": (["group", "group", "."],),
    "compare": (["run"], ["run", "group/other"]),
    "predict": (["run"], ["picture.png", "pictures", "pictures/cat"]),
    "export": (["run"], ["--format=safetensors"]),
    "reproduce": (["S0", "S1", "S3", "S4", "all", "s3_learning_rate", "S9", "smoke", *WORDS],),
}
"""What stands before the options, where it is right; other commands take a run or overrides."""
BROKEN_KEYS = listed(
    "{key}x +{key} ++{key} ~{key} {key}.x {key}[0] {key}@x {key}@a:b .{key} {key}. {key}._target_ "
    "+{key}.new choices.{key} study.{key} protocols.sound.{key} +figures.{key} ü"
)


class Generator:
    """Makes the lines of one seed. `watch` is left out: to wait is what it is for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.keys = setting_keys()
        self.options = {group: sorted(options) for group, options in find_options().items()}

    def line(self, number: int) -> Words:
        """Return a command and its arguments."""
        chance = random.Random(f"{self.seed}:{number}")
        # train has the most to say; every other command is as probable as the next
        command = chance.choice([*(c for c in COMMANDS if c != "watch"), *["train"] * 5])
        if command == "train":
            words = self._train(chance)
        elif command in ("describe", "benchmark", "prove_resume"):
            words = self._overrides(chance)
            if chance.random() < 0.2:
                words += chance.choice(HYDRA)
        else:
            words = _places(command, chance)
        for _ in range(chance.choice((0, 1, 1, 2)) if command != "train" else 0):
            words += _option(chance, OPTIONS.get(command, {}) | {"--trust": WORDS})
        words += [ALWAYS[command]] if command in ALWAYS else []
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
                words.append(f"search.{key}={_value(chance)}")
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
            slips = [key[:-1], key.upper(), key.replace(".", "..", 1), key.replace(".", "/")]
            slips += [f" {key}", f"{key} ", key.rpartition(".")[2], "x" * 400, "", "a." * 999]
            key = chance.choice((*BROKEN_KEYS, *slips)).replace("{key}", key)
        return f"{key}={_value(chance)}"


def _value(chance: random.Random) -> str:
    pools: tuple[Sequence[str], ...] = (NUMBERS, NUMBERS, WORDS, WORDS, PATHS, SWEEPS)
    return chance.choice(chance.choice(pools))


def _places(command: str, chance: random.Random) -> Words:
    """Return what stands before the options of a command that takes no overrides."""
    words = []
    for pool in PLACES.get(command, (["run"],)):
        if chance.random() < 0.93:
            words.append(chance.choice(pool if chance.random() < 0.6 else PATHS))
        if chance.random() < 0.07:
            words.append(chance.choice(PATHS))
    return words


def _option(chance: random.Random, known: Options) -> Words:
    name = chance.choice(sorted(known))
    if not known[name]:
        return [name]
    value = chance.choice(known[name])
    return [f"{name}={value}"] if chance.random() < 0.3 else [name, value]


def _mangle(chance: random.Random, words: Words) -> None:
    """Break a line as a slip of the hand would."""
    if not words:
        return
    place = chance.randrange(len(words))
    word = words[place]
    other = chance.choice((*WORDS, *PATHS))
    slips: tuple[Words, ...] = (
        *([], [word, word], [word.replace("=", " = ")], word.split("=", 1), [f"--{word}"]),
        *([word, other], [other, word], [word + other], [word[: len(word) // 2]]),
        *([word.replace("=", "==")], [word, "--"], ["--", word]),
    )
    words[place : place + 1] = chance.choice(slips)
