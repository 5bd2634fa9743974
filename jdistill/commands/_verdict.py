"""Judge whether the robust accuracies of a workdir's networks are to be believed.

    jdistill verdict runs/mnist
    jdistill verdict runs/mnist --temperature 100 --generation 0

It judges the networks that --chain, --temperature, --seed, and --generation choose, with the
study's radius and examples; what was judged is kept. Costs on 2 CPU cores: about a minute for each
of the papers' MNIST networks, seconds for the digits.
"""

import dataclasses
from collections.abc import Sequence

import tyro

from jdistill import runtime
from jdistill.commands._attack import Chosen
from jdistill.study import _measure, _workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Chosen):
    """Which networks are judged."""


def run(arguments: Sequence[str]) -> None:
    """Judge the networks, and print the verdicts."""
    options = tyro.cli(
        Options,
        prog="jdistill verdict",
        description=__doc__,
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    folder, study, chosen = options.open("verdict")
    if study.verdict is None:
        raise ValueError(
            f"expected a study with a verdict in {folder}, got one without; run it again in "
            "another workdir with verdict examples"
        )
    everyone = dataclasses.replace(options, chain=(), temperature=(), seed=(), generation=())
    plain = [each for each in everyone.open("verdict")[2] if _measure.is_plain(study, each)]
    examples = study.examples()
    shards = runtime.ShardFolder(folder / "shards")
    with _workdir.held(folder), runtime.progress() as progress:
        for network in chosen:
            surrogate = _measure.surrogate_of(network, plain)
            progress.prefix = f"{network.title}, "
            verdict = _measure.judge(study, network, surrogate, examples, shards, callback=progress)
            progress.close()
            print(f"{network.title}\n{verdict}\n")
