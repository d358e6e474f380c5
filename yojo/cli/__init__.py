"""The command line: yojo demo, score, serve, best, pairs, filter, eval, rank, data, train, import, export, merge, profile, info.

A file a group of commands. They are all loaded to show the help, so that nothing heavy may stand at the top of any: what a
command needs is imported when it runs.
"""

import typer

from yojo.cli import choosing, converting, data, demo, evaluating, info, profiling, ranking, scoring, serving, training
from yojo.cli.quiet import be_quiet

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which takes as long to load as all else here
    help="Score N candidate responses to one multimodal prompt in one forward pass.",
)
data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at preference data.")
data_app.command("check")(data.check)

app.command()(demo.demo)
app.command(cls=scoring.ScoreCommand)(scoring.score)
app.command(cls=scoring.ScoreCommand)(serving.serve)
app.command()(choosing.best)
app.command()(choosing.pairs)
app.command(name="filter")(choosing.filter_)
app.command(name="eval")(evaluating.eval_)
app.command()(ranking.rank)
app.add_typer(data_app, name="data")
# Its options are those of two dataclasses, which parse them.
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    training.train
)
app.command(name="import")(converting.import_)
app.command()(converting.export)
app.command()(converting.merge)
app.command()(profiling.profile)
app.command()(info.info)


def main():
    """Entry point of the `yojo` command."""
    be_quiet()
    app()
