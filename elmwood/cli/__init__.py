"""The command line: verbs are the words of the pipeline. stdout is the thing made, stderr is progress.

The tables of verbs are all that `elmwood --help` reads. The module of a verb has its signature and prints its result; it is imported when
the verb is called. What it computes is in `elmwood.study`.
"""

import errno
import io
import os
import re
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from elmwood import __version__
from elmwood.errors import ElmwoodError

# verb -> its function, and its help line: the first line of the function's docstring (a test compares them)
VERBS = {
    "demo": ("demo:demo", "Grow a forest from text and compare it with every control. Interrupted runs resume."),
    "cluster": ("text:cluster", "Read a corpus and discover its domains: makes a partition. Interrupted runs resume."),
    "split": ("text:split", "Split one domain into several; the experts of the other domains stay valid."),
    "add": ("text:add", "Add new domains from a corpus to a partition; the experts of the old domains stay valid."),
    "train": (
        "train:train",
        "Train one expert per domain from the seed, without communication; or tune a mixture. Interrupted runs resume.",
    ),
    "adopt": ("train:adopt", "Take a LoRA or DoRA adapter, or a full fine-tune, made elsewhere as an expert."),
    "fit": ("train:fit", "Predict the memory and time of a training run, and what would fit. The seed's config is enough."),
    "forest": ("models:forest", "Combine a seed, a partition and experts into a forest."),
    "eval": (
        "evaluate:evaluate",
        "Bits per byte on held-out documents, with every routing of a forest; or, with --tasks, benchmarks.",
    ),
    "table": ("evaluate:table", "Best weights of a forest's experts, the value of each and which to keep. Each model is run at most once."),
    "compare": ("evaluate:compare", "Is B better than A? Runs both only on as many held-out blocks as it takes to know."),
    "accept": ("evaluate:accept", "May an expert join a forest? Prints every check with its value and threshold; keeps the verdict."),
    "chat": ("models:chat", "Continue text, and show which experts were used."),
    "serve": ("models:serve", "Serve a model to OpenAI clients and, at /, to people. It can say which experts answered."),
    "gateway": (
        "models:gateway",
        "Route each request to an expert that a vLLM, SGLang or elmwood server behind it runs. No model is opened here.",
    ),
    "merge": ("merge:merge", "Merge experts into one checkpoint, or adapters into one adapter. Several settings give several merges."),
    "statistics": ("train:statistics", "Compute Gram and Fisher matrices of experts on their own text, for merge rules that need them."),
    "mix": ("models:mix", "Combine experts into one mixture-of-experts model of a standard architecture."),
    "loads": ("models:loads", "Load of each expert of a mixture, by layer and domain, and which experts are dead."),
    "join": (
        "volunteer:join",
        "Volunteer for a hub: lease a domain, train its expert here, submit it, hear the verdict. Interrupted runs resume.",
    ),
    "verify-work": (
        "volunteer:verify_work",
        "Verify what volunteers submitted to a hub: its form, copies, gain on secret text, harm to other domains.",
    ),
    "pull": (
        "volunteer:pull",
        "Bring a hub's shared ensemble into the store, checked: only what is missing. chat, merge and mix work on it at once.",
    ),
    "report": ("store:report", "Write one self-contained HTML page: domain map, curves, routing, results, lineage."),
    "export": ("store:export", "Write a folder that other tools read: transformers, PEFT, GGUF, or a partition with or without its text."),
    "show": ("store:show", "List the names in the store, or the lineage of one of them."),
    "verify": ("store:verify", "Check every digest and every reference; report exactly what is damaged."),
}
SEED_VERBS = {
    "train": (
        "train:seed_train",
        "Train a seed from scratch, with its own tokenizer: a small Llama or any architecture, also under torchrun.",
    ),
    "diloco": (
        "train:seed_diloco",
        "Train a seed further at several trusted sites over slow links (DiLoCo, by torchft). Each runs this; interrupted ones resume.",
    ),
    "import": (
        "train:seed_import",
        "Import a causal language model of transformers as a seed. It is tried: what it cannot be used for is said, with the reason.",
    ),
    "from": (
        "train:seed_from",
        "Make a merge, or one expert, the seed of the next round. Its lineage has all seeds and experts before it.",
    ),
}
STATE_VERBS = {
    "make": ("merge:state_make", "Sum one or more experts under a merge rule: what another machine can add to its own sum."),
    "add": ("merge:state_add", "Add states. An expert that is in several counts once."),
    "remove": ("merge:state_remove", "Subtract experts from a state, exactly."),
    "finalize": ("merge:state_finalize", "Turn states into a checkpoint. No expert is read."),
}
HUB_VERBS = {
    "publish": ("hub:publish", "Publish a run, or its next version: who joins trains experts of this seed for its domains."),
    "up": ("hub:up", "Serve a run to volunteers and verifiers."),
    "status": ("hub:status", "What a run has: domains, leases, submissions, experts."),
    "mirror": (
        "volunteer:mirror",
        "Upload each expert of a forest, and a merged or mixed model, to a Hugging Face account, each with its card.",
    ),
    "trust": ("hub:trust", "Give a key a role: member, verifier or admin."),
    "retire": ("hub:retire", "Take an expert out of the shared ensemble; its domain opens again."),
    "merge": ("hub:merge", "Keep the merge of a run's experts: what was accepted is added, what was retired is subtracted exactly."),
    "backup": ("hub:backup", "Copy a running hub into a new folder: database, keys and blobs."),
    "move": ("hub:move", "Copy a hub's database into another, empty one: SQLite to PostgreSQL, or back."),
    "doctor": ("hub:doctor", "Check a hub: keys, manifest, log, ledger, snapshots and every blob."),
    "demo": (
        "hub:demo",
        "A community in a box: a hub here with five volunteers, two of them dishonest, one killed.",
    ),
}
STAR_VERBS = {
    "plan": ("star:plan", "Plan a star: the seed, the text, the steps of a machine, and what becomes of what it sends."),
    "serve": ("star:serve", "Coordinate a star: grant text, check what comes, make versions. A killed one is started again and goes on."),
    "key": ("star:key", "Print the public key of this machine, which is made at the first call."),
    "join": ("star:join", "Take part in a star: train slices of its text, send what changed. Interrupted machines resume."),
    "check": ("star:check", "Compute every version of a star again from what it applied, and compare the bytes."),
    "take": ("star:take", "Keep a version of a star as a seed, from which experts branch."),
}
GROUPS = {
    "hub": (HUB_VERBS, "Let others train: publish a run, serve it, keep it."),
    "seed": (SEED_VERBS, "Make the shared starting model: train one from scratch, here or at several sites, or import one."),
    "star": (STAR_VERBS, "Train one seed on several machines over slow links."),
    "state": (STATE_VERBS, "Unfinished merges: sums of experts that add and subtract exactly, in any order."),
}
# places of the verbs that run models; `fit` has a --device of its own
COMPUTING = frozenset({
    "demo:demo", "text:cluster", "text:split", "text:add", "train:train", "train:adopt", "train:statistics", "train:seed_train",
    "train:seed_diloco", "train:seed_import", "evaluate:evaluate", "evaluate:table", "evaluate:compare", "evaluate:accept",
    "models:chat", "merge:merge", "models:mix", "models:loads", "models:serve", "star:serve", "star:join", "volunteer:join",
    "volunteer:verify_work", "hub:demo",
})  # fmt: skip
PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None}


def lazy(verbs: dict[str, tuple[str, str]], groups: dict[str, Any]) -> type[TyperGroup]:
    """A group whose verbs are imported when they are called."""

    class Verbs(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return [*groups, *verbs]

        def get_command(self, ctx: Any, name: str) -> Any:
            if name in groups:
                return super().get_command(ctx, name)
            return _command(name, verbs[name][0]) if name in verbs else None

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, line) for name, (_, line) in (groups | verbs).items()])

    return Verbs


def _command(name: str, place: str) -> Any:
    """The function of a verb, `module:function`, as a command."""
    from elmwood.cli.options import command, computing

    module, _, function = place.partition(":")
    verb = getattr(import_module(f"elmwood.cli.{module}"), function)
    single = typer.Typer(**PLAIN)
    single.command(name)(computing(command(verb)) if place in COMPUTING else command(verb))
    return typer.main.get_command(single)


app = typer.Typer(no_args_is_help=True, cls=lazy(VERBS, GROUPS), **PLAIN)
for _name, (_verbs, _line) in GROUPS.items():
    _group = typer.Typer(no_args_is_help=True, help=_line, cls=lazy(_verbs, {}), **PLAIN)
    _group.callback()(lambda: None)
    app.add_typer(_group, name=_name)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Grow one language model out of many small experts."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


# errno -> what the system refused, and what helps
SYSTEM = {
    errno.ENOSPC: ("no space left on the disk", "free some and run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some and run the same command again"),
    errno.EFBIG: ("a file would be larger than the limit on file sizes (ulimit -f)", "raise it and run the same command again"),
    errno.EROFS: ("the file system is read-only", "name another folder, for the store with --store"),
    errno.EACCES: ("permission denied", "change the owner or the permissions, or name another folder, for the store with --store"),
    errno.EPERM: ("not permitted", "change the owner or the permissions, or name another folder, for the store with --store"),
    errno.ENOTDIR: ("a file is where a folder is needed", "name a folder, for the store with --store"),
    errno.EEXIST: ("a file is where a folder is needed", "name a folder, for the store with --store"),
    errno.EISDIR: ("a folder is where a file is needed", "name a file"),
    errno.ENOENT: ("no such file or folder", "check the path, and TMPDIR if it is set"),
    errno.EMFILE: ("too many open files (ulimit -n)", "raise the limit and run the same command again"),
    errno.ENAMETOOLONG: ("a file name is too long", "choose a shorter one"),
    errno.ELOOP: ("a link leads to itself", "remove it"),
    errno.EIO: ("the disk cannot be read or written", "check it, and run `elmwood verify`"),
}


def of_system(error: Exception) -> str:
    """The rule, the file and the cure of what the system refused; empty for other errors. Libraries in Rust say it in words only."""
    spelled = re.search(r"\(os error (\d+)\)", str(error))
    number = getattr(error, "errno", None) or (int(spelled[1]) if spelled else None)
    if number not in SYSTEM:
        return ""
    from elmwood.cli.screen import printable

    rule, cure = SYSTEM[number]
    place = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return printable(f"{rule} ({os.fsdecode(place) if isinstance(place, str | bytes) else str(error)[:200]}): {cure}")


def main() -> None:
    """The entry point: our errors become one line on stderr and a non-zero exit."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait slow each other down on a busy machine
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")  # a locale without UTF-8: what it cannot show is a question mark
    try:
        app()
    except ElmwoodError as error:
        from elmwood.cli.screen import printable

        sys.stderr.write(f"elmwood: {printable(str(error))}\n")
        sys.exit(1)
    except MemoryError:
        sys.stderr.write("elmwood: memory ran out: ask for less at once (--workers, --batch, --length), or use a larger machine\n")
        sys.exit(1)
    except Exception as error:
        if not (told := of_system(error)):
            raise
        sys.stderr.write(f"elmwood: {told}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("\nelmwood: stopped; run the same command again to resume\n")
        sys.exit(130)
