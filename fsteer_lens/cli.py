"""The command `fsteer-lens`: a demonstration, a look at the environment, fitting and generating with files.

Every subcommand imports what it needs when it is run, so that `--help` answers at once.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsteer_lens.errors import FsteerError, InputError

if TYPE_CHECKING:
    from fsteer_lens.ground.terminal import Terminal
    from fsteer_lens.prompts.contrasts import ContrastSet
    from fsteer_lens.trace.trace import Trace

REQUIRED = (
    "torch",
    "transformer-lens",
    "transformers",
    "huggingface-hub",
    "tokenizers",
    "safetensors",
    "numpy",
    "einops",
    "jaxtyping",
)
REQUIRED += ("scikit-learn", "plotly", "circuitsvis", "rich")
OPTIONAL = ("pandas", "ipykernel", "jupyterlab", "anywidget")
PARTS = ("prompt", "preferred", "undesired", "label", "context", "group")
"""What a row of data holds, each in a column of that name unless another is named."""
STEERING = "a file that 'fit' wrote, or hf://owner/name@revision"
DTYPES = ("float32", "bfloat16", "float16")
SUITES = {
    "truthfulqa": "mc_task.json of TruthfulQA",
    "harmbench": "harmbench_behaviors_text_all.csv",
    "xstest": "xstest_prompts.csv",
}
INPUTS = ("data", "general", "near_misses", "steering", "resume")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def find_browser() -> str | None:
    """Path of the first Chromium-like browser found."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0 done, 1 doctor misses something, 2 unusable input."""
    args = _parser().parse_args(argv)
    try:
        from fsteer_lens.ground.terminal import warnings_said

        with warnings_said(_console(stderr=True)):
            _require_effect(args)
            _require_numbers(args)
            return args.run(args)
    except FsteerError as error:
        _console(stderr=True).say(f"error: {error}", style="red")
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    about = "Steer a language model and see what that did."
    parser = argparse.ArgumentParser(prog="fsteer-lens", description=about)
    parser.add_argument("--version", action="version", version=importlib.metadata.version("fsteer-lens"))
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="steer a chat model and the tutor, compare methods, write a report")
    demo.set_defaults(run=_demo)
    option = demo.add_argument
    option("--out", type=Path, default=Path("out/demo.html"), help="the report (default: %(default)s)")
    option("--seed", type=int, default=0)
    option("--model", help="a chat model's name or folder; 'tutor' alone (default: smollm2 where it is installed)")
    option("--full", action="store_true", help="measure the tutor on all test prompts, not on a sample: some minutes")
    option("--open", action="store_true", help="open the report in the browser")

    doctor = commands.add_parser("doctor", help="versions, model classes, GPU, browser, hub login")
    doctor.set_defaults(run=_doctor)

    model = argparse.ArgumentParser(add_help=False)
    option = model.add_argument
    option("--model", required=True, help="a Hugging Face name, a folder, a .gguf file, 'tutor' or 'smollm2'")
    option("--kind", choices=["hooked", "bridge"], help="class of the model (default: bridge; hooked for the tutor)")
    option("--device", default="cpu")
    option("--dtype", choices=list(DTYPES), help="of the weights (default: float32)")
    switch = argparse.BooleanOptionalAction
    option("--chat", action=switch, help="put prompts through the chat template (default: as fitted)")
    option("--chat-template-kwargs", type=_json, metavar="JSON", help="such as '{\"enable_thinking\": false}'")
    option("--prepend-bos", action=switch, help="a beginning-of-sequence token before plain text (default: as fitted)")
    option("--batch-size", type=int, default=8)

    columns = argparse.ArgumentParser(add_help=False)
    option = columns.add_argument
    for part in PARTS:
        more = "; of --general too" if part == "prompt" else ""
        option(
            f"--{part}-column", metavar="NAME", help=f"column of --data that holds the {part}{more} (default: {part})"
        )

    fit = commands.add_parser("fit", parents=[model, columns], help="fit a steering to contrasts and save it")
    fit.set_defaults(run=_fit)
    option = fit.add_argument
    option("--data", type=Path, required=True, help=f".jsonl or .csv: {', '.join(PARTS)}; or TruthfulQA.csv")
    option("--layer", type=int, help="where to steer (default: half way up; --auto tries three depths)")
    option("--out", type=Path, required=True, help="the steering, a .safetensors file")
    about = "choose layer and strength on a quarter that is held out, within budgets; needs --general"
    option("--auto", action="store_true", help=about)
    option("--kl", type=float, help="with --auto: what prompts to leave alone may cost, in nats (default: 0.1)")
    option("--resume", type=Path, help="with --auto: a file of finished layers to go on from")
    option("--shift", choices=["response_mean", "last_prompt"], default="response_mean")
    option("--rank", type=int, help="rank of the gate's subspace")
    kinds = ["quantile", "logistic", "energy", "linear", "residual_ratio", "cosine", "null_space", "none"]
    option("--gate", choices=kinds, help="none: always (default: linear with --general, else quantile)")
    option("--general", type=Path, help="prompts to leave alone: .txt, .jsonl or .csv")
    option("--near-misses", type=Path, help="those of them that look like prompts to be steered, likewise")
    option("--strength", type=float, help="(default: 1)")
    option("--scope", choices=["all", "prompt", "generated"], help="positions (default: by --shift)")
    option("--preset", choices=["paper", "0.1"], help="trained, to the paper's letter or as by 0.1 (default: not)")
    option("--seed", type=int, default=0)

    generate = commands.add_parser("generate", parents=[model], help="generate text under a saved steering")
    generate.set_defaults(run=_generate)
    option = generate.add_argument
    option("prompts", nargs="+", metavar="prompt")
    option("--steering", required=True, help=STEERING)
    option("--answer-start", metavar="TEXT", help="the beginning of each answer, in a chat, which goes on from there")
    option("--compare", action="store_true", help="beside the text without steering, and how far apart")
    option("--max-new-tokens", type=int, default=64)
    option("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    option("--temperature", type=float, help="with --sample (default: 1)")
    option("--seed", type=int, help="with --sample (default: 0)")

    watch = commands.add_parser("watch", parents=[model], help="a page on which a steered generation is watched")
    watch.set_defaults(run=_watch)
    option = watch.add_argument
    option("prompts", nargs="+", metavar="prompt")
    option("--steering", required=True, help=STEERING)
    option("--out", type=Path, default=Path("watch.html"), help="the page (default: %(default)s)")
    option("--max-new-tokens", type=int, default=32)

    evaluate = commands.add_parser("evaluate", parents=[model], help="measure a saved steering on public data")
    evaluate.set_defaults(run=_evaluate)
    option = evaluate.add_argument
    option("--steering", required=True, help=STEERING)
    for name, file in SUITES.items():
        option(f"--{name}", type=Path, metavar="FILE", help=f"{file}, as its authors publish it")
    option("--limit", type=int, help="take at most so many items of each file, evenly spread")

    gate = commands.add_parser(
        "gate", parents=[model, columns], help="when the gate of a saved steering decides wrongly"
    )
    gate.set_defaults(run=_gate)
    option = gate.add_argument
    option("--steering", required=True, help=STEERING)
    option("--data", type=Path, required=True, help=".jsonl or .csv as for 'fit', best of prompts that it did not see")
    option("--general", type=Path, required=True, help="prompts to leave alone; every second one sets a threshold")
    option("--false-alarms", type=float, default=0.05, help="the rate of that threshold (default: %(default)s)")
    option("--seed", type=int, default=0, help="of the perturbations")

    report = commands.add_parser("report", parents=[model, columns], help="write a page on what a saved steering does")
    report.set_defaults(run=_report)
    option = report.add_argument
    option("--steering", required=True, help=STEERING)
    option("--data", type=Path, required=True, help=".jsonl or .csv as for 'fit', best of prompts that it did not see")
    option("--general", type=Path, help="prompts to leave alone: .txt, .jsonl or .csv")
    option("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    option("--max-new-tokens", type=int, default=32)
    option("--seed", type=int, default=0, help="of the bootstrap intervals")
    option("--limit", type=int, help="take at most so many contrasts, and so many general prompts, evenly spread")
    option("--no-sweep", action="store_true", help="leave out the other strengths")
    return parser


def _console(stderr: bool = False) -> "Terminal":
    from fsteer_lens.ground.terminal import Terminal

    return Terminal(stderr=stderr)


def _require_effect(args: argparse.Namespace) -> None:
    """Raise `InputError` where options of `fit` have none."""
    given = [getattr(args, name, None) for name in ("rank", "general", "near_misses")]
    if getattr(args, "gate", None) == "none" and any(one is not None for one in given):
        raise InputError("--rank, --general and --near-misses have no effect with --gate none", fix="Leave them out.")


def _require_numbers(args: argparse.Namespace) -> None:
    """Raise `InputError` where a number is out of range: found out now, not after minutes of work."""
    from fsteer_lens.ground.checks import LARGEST_SEED, finite, whole

    ranges = {"seed": (0, LARGEST_SEED), "layer": (0,)}
    ranges |= dict.fromkeys(("rank", "batch_size", "limit", "max_new_tokens"), (1,))
    for name, bounds in ranges.items():
        if getattr(args, name, None) is not None:
            whole(_option(name), getattr(args, name), *bounds)
    if getattr(args, "strength", None) is not None:
        finite(_option("strength"), args.strength)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _demo(args: argparse.Namespace) -> int:
    from fsteer_lens.demo import demo

    demo(args.out, model=args.model, seed=args.seed, full=args.full, open_browser=args.open)
    return 0


def _load_model(args: argparse.Namespace) -> Any:
    if args.model == "tutor":
        from fsteer_lens import tutor

        if args.dtype not in (None, "float32"):
            fix = "Leave --dtype out: its exact answers were measured in float32."
            raise InputError("--dtype of the tutor", expected="float32", got=args.dtype, fix=fix)
        return tutor.load(args.kind, device=args.device)
    import torch

    from fsteer_lens import models

    return models.load(args.model, kind=args.kind, device=args.device, dtype=getattr(torch, args.dtype or "float32"))


def _fit(args: argparse.Namespace) -> int:
    from fsteer_lens import collect, collect_queries, fit, save

    _require_out(args)
    if args.auto:
        return _fit_auto(args)
    for name in ("kl", "resume"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} has no effect without --auto", fix="Add --auto, or leave it out.")
    contrasts, told = _sets(args)
    model = _load_model(args)
    run = {"layer": model.cfg.n_layers // 2 if args.layer is None else args.layer, **_passes(args)}
    activations = collect(model, contrasts, shift=args.shift, **run)
    others: dict[str, Any] = {name: collect_queries(model, prompts, **run) for name, prompts in told.items()}
    options = {"seed": args.seed, **_given(args, "strength", "scope", "preset", "rank", "gate")}
    steering = fit(activations, **others, **options)
    save(steering, args.out, model=model)
    _console().say(f"{steering}\nfitted to {len(contrasts)} contrasts, saved as {args.out}")
    return 0


def _fit_auto(args: argparse.Namespace) -> int:
    """Choose layer and strength by a recipe."""
    from fsteer_lens import recipe, save

    given = [name for name in ("rank", "gate", "strength", "scope", "preset") if getattr(args, name) is not None]
    if given:
        raise InputError(f"--{given[0]} has no effect with --auto, which chooses", fix="Leave one of them out.")
    if args.general is None:
        raise InputError("--auto", expected="--general, prompts to be left alone", got="none")
    contrasts, told = _sets(args)
    model = _load_model(args)
    layers = None if args.layer is None else [args.layer]
    options = {"shift": args.shift, "seed": args.seed, **_given(args, "kl", "resume"), **_passes(args)}
    found = recipe(model, contrasts, **told, layers=layers, **options)
    save(found.steering, args.out, model=model)
    _console().say(f"{found}\nsaved as {args.out}")
    return 0


def _sets(args: argparse.Namespace) -> tuple["ContrastSet", dict[str, Any]]:
    """The contrasts, and the prompts to be left alone that were given, by the name that `fit` and `recipe` take."""
    from fsteer_lens.prompts.files import read_contrasts, read_prompts

    columns = _columns(args)
    contrasts = read_contrasts(args.data, columns)
    paths = {"general": args.general, "near_misses": args.near_misses}
    told = {name: read_prompts(path, columns.get("prompt")) for name, path in paths.items() if path is not None}
    return contrasts, told


def _evaluate(args: argparse.Namespace) -> int:
    """Measure a saved steering on the files that are named, beside the unsteered model."""
    from fsteer_lens import evaluate, evaluation, load

    readers = {
        "truthfulqa": evaluation.TruthfulQA.from_json,
        "harmbench": evaluation.harmbench,
        "xstest": evaluation.xstest,
    }
    suites = [readers[name](path, limit=args.limit) for name in SUITES if (path := getattr(args, name)) is not None]
    if not suites:
        raise InputError("evaluate", expected=f"one of --{', --'.join(SUITES)}", got="none")
    model = _load_model(args)
    methods = {"unsteered": None, "steered": load(args.steering, model=model)}
    for suite in suites:
        found = evaluate(model, methods, suite, **_passes(args))
        _console().say(f"{suite.name}\n{found.to_markdown()}")
    return 0


def _gate(args: argparse.Namespace) -> int:
    """Print what a saved steering's gate misses, and where it opens wrongly, under every perturbation."""
    from fsteer_lens import gate_report, load
    from fsteer_lens.evaluation import PERTURBATIONS
    from fsteer_lens.ground.tables import markdown
    from fsteer_lens.prompts.files import read_contrasts, read_prompts
    from fsteer_lens.prompts.forms import texts_of

    columns = _columns(args)
    harmful = texts_of(read_contrasts(args.data, columns).prompts, "prompt")
    general = texts_of(read_prompts(args.general, columns.get("prompt")), "general prompt")
    model = _load_model(args)
    steering = load(args.steering, model=model)
    rate = {"false_alarm_rate": args.false_alarms, "seed": args.seed}
    report = gate_report(
        model, {"gate": steering}, harmful, general[1::2], calibration=general[::2], **rate, **_passes(args)
    )
    rows = []
    for way in PERTURBATIONS:
        found = [report.row("gate", way.name, same_rate=same) for same in (False, True)]
        rows.append([way.name, *(str(share) for row in found for share in (row.missed, row.false_alarms))])
    titles = [
        "perturbation",
        "missed",
        "false alarms",
        *(f"{name}, {args.false_alarms:g}" for name in ("missed", "false alarms")),
    ]
    _console().say(markdown(titles, rows))
    return 0


def _report(args: argparse.Namespace) -> int:
    from fsteer_lens import load
    from fsteer_lens.evaluation import every
    from fsteer_lens.prompts.files import read_contrasts, read_prompts
    from fsteer_lens.report import steering_report

    _require_out(args)
    columns = _columns(args)
    contrasts = every(read_contrasts(args.data, columns), args.limit)
    general = [] if args.general is None else every(read_prompts(args.general, columns.get("prompt")), args.limit)
    model = _load_model(args)
    report = steering_report(
        model,
        load(args.steering, model=model),
        contrasts,
        general,
        title=f"What {Path(args.steering).stem} did",
        max_new_tokens=args.max_new_tokens,
        **_passes(args),
        seed=args.seed,
        sweep=not args.no_sweep,
    )
    path = report.write(args.out)
    _console().say(f"the report, {path.stat().st_size / 2**20:.1f} MB: {path}")
    return 0


def _require_out(args: argparse.Namespace) -> None:
    """Raise `InputError` where --out cannot be written or is an input: found out now, not after minutes of work.

    Another file of that name is replaced, as by other programs with --out: a second run writes what the first one did.
    """
    from fsteer_lens.ground.files import require_writable

    require_writable(args.out)
    for name in INPUTS:
        given = getattr(args, name, None)
        if given is not None and args.out.exists() and Path(given).exists() and args.out.samefile(given):
            raise InputError("--out", expected="another file than the inputs", got=f"{args.out}, which is --{name}")


def _columns(args: argparse.Namespace) -> dict[str, str]:
    """The columns that were named on the command line, by what they hold."""
    named = {part: getattr(args, f"{part}_column") for part in PARTS}
    return {part: name for part, name in named.items() if name is not None}


def _passes(args: argparse.Namespace) -> dict[str, Any]:
    """How prompts become tokens, and how many at once."""
    return {name: getattr(args, name) for name in ("chat", "chat_template_kwargs", "prepend_bos", "batch_size")}


def _json(text: str) -> Any:
    """A JSON object on the command line."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from error


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options that were given on the command line: the others keep the library's defaults."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _generate(args: argparse.Namespace) -> int:
    from rich.rule import Rule
    from rich.text import Text

    from fsteer_lens import generate, load

    given = _given(args, "temperature", "seed")
    if given and not args.sample:
        raise InputError(f"--{next(iter(given))} has no effect on greedy text", fix="Add --sample, or leave it out.")
    sampling = {"do_sample": True, "seed": 0, **given} if args.sample else {}
    if args.answer_start is not None and args.chat is False:
        raise InputError("--answer-start needs a chat", expected="--chat", got="--no-chat", fix="Leave one out.")
    begun = [] if args.answer_start is None else [{"role": "assistant", "content": args.answer_start}]
    prompts = [[{"role": "user", "content": text}, *begun] for text in args.prompts] if begun else args.prompts
    options = {"max_new_tokens": args.max_new_tokens, **_passes(args)}
    model = _load_model(args)
    steering = load(args.steering, model=model)
    rows = generate(model, prompts, steering, compare=args.compare, **options, **sampling)
    console = _console()
    for prompt, row in zip(args.prompts, rows, strict=True):
        console.print(Rule(Text(prompt), align="left"))
        if row.baseline is not None:
            console.print(Text("unsteered  ", style="dim"), Text(row.baseline.text))
        console.print(Text("steered    ", style="dim"), Text(row.text))
        for line in _decisions(row.trace):
            console.print(Text(line, style="dim"))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from fsteer_lens import figures, generate, load

    _require_out(args)
    model = _load_model(args)
    steering = load(args.steering, model=model)
    options = {"max_new_tokens": args.max_new_tokens, **_passes(args)}
    made = generate(model, args.prompts, steering, compare=True, replay=True, **options)
    figures.save(figures.replay(made, titles=args.prompts), args.out)
    _console().say(f"the page: {args.out}")
    return 0


def _decisions(trace: "Trace") -> Iterator[str]:
    """Describe what one row's trace recorded, a line for each layer, and for each link of a chain."""
    from fsteer_lens.method.experts import mentioned

    for part in trace.parts or (trace,):
        for layer, gate in part.gate.items():
            line = f"layer {layer}: gate {gate[0]:.2f}"
            if layer in part.weights:
                weights = part.weights[layer][0]
                expert = int(weights.argmax())
                line += ", " if gate[0] > 0 else ", nothing added; it would route to "
                line += f"{mentioned(expert, part.names.get(layer))} with weight {weights[expert]:.2f}"
            yield line
    if trace.steps is not None and trace.steps.kl is not None:
        yield f"KL(steered || unsteered): {trace.steps.kl.nanmean():.3f} nats a token"


def _doctor(args: argparse.Namespace) -> int:
    """Print what is installed and what works here; 1 where something that is needed is missing."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="fsteer-lens doctor", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    healthy = True
    with _console(stderr=True).status("looking around"):
        for good, name, finding in _findings():
            healthy &= good is not False
            mark = {True: ("✓", "green"), None: ("–", "dim"), False: ("✗", "red")}[good]
            table.add_row(Text(*mark), name, Text(finding))
    _console().tabulate(table)
    return 0 if healthy else 1


def _findings() -> Iterator[tuple[bool | None, str, str]]:
    """Yield (True good, None absent but not needed, False missing; what it is; what was found)."""
    yield (
        sys.version_info >= (3, 11),
        "Python",
        f"{platform.python_version()}, {platform.platform(terse=True)}",
    )
    for name in ("fsteer-lens", *REQUIRED, *OPTIONAL):
        try:
            yield True, name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield ((None, name, "not here; notebooks need it") if name in OPTIONAL else (False, name, "missing"))
    yield _model_classes()
    yield _gpu()
    browser = find_browser()
    yield (
        bool(browser) or None,
        "browser",
        browser or "no Chromium or Chrome on the path; only browser tests need it",
    )
    yield _hub()


def _model_classes() -> tuple[bool, str, str]:
    from fsteer_lens.models.classes import CLASS_NAMES, available_kinds

    try:
        return True, "model classes", " and ".join(CLASS_NAMES[kind] for kind in available_kinds())
    except ImportError as error:
        return False, "model classes", f"none: {error}"


def _gpu() -> tuple[bool | None, str, str]:
    try:
        import torch
    except ImportError:
        return None, "GPU", "unknown without torch"
    if torch.cuda.is_available():
        return True, "GPU", ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    if torch.backends.mps.is_available():
        return True, "GPU", "Apple (mps)"
    return None, "GPU", f"none; the CPU does it with {torch.get_num_threads()} threads"


def _hub() -> tuple[bool | None, str, str]:
    from huggingface_hub import constants, get_token

    login = "logged in" if get_token() else "not logged in; public models only"
    offline = f"HF_HUB_OFFLINE is {'on' if constants.HF_HUB_OFFLINE else 'off'}"
    return bool(get_token()) or None, "Hugging Face hub", f"{login}; {offline}"
