"""Messages of the parser that users would have to decode are rewritten."""

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from teamnet_pl.cli.messages import plain_message
from teamnet_pl.commands.blocks import show_blocks
from teamnet_pl.commands.export import export_teammate


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (
            show_blocks,
            ["--num_classes", "many"],
            "--num_classes takes a whole number, found 'many'.",
        ),
        (
            show_blocks,
            ["--depths", "deep"],
            "--depths takes a whole number or a list such as [1,2], found 'deep'.",
        ),
        (show_blocks, ["--json", "7"], "--json takes true or false, found '7'."),
        (show_blocks, ["--colour", "red"], "There is no option --colour."),
        (show_blocks, ["red"], "There is no argument red."),
        (show_blocks, [], "These options are required: backbone."),
        (
            export_teammate,
            ["--formats", "[jpeg]"],
            "--formats takes one of safetensors, torch_export, onnx, onnx_int8, executorch, "
            "onnx_all_depths, hub, found 'jpeg'.",
        ),
    ],
)
def test_messages_of_the_parser_in_plain_words(command, words, message):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(command, as_group=False)
    with pytest.raises(ArgumentError) as raised:
        parser.parse_args(words)
    assert plain_message(str(raised.value)) == message


def test_other_messages_stay():
    assert plain_message("There is no file\nx.") == "There is no file\nx."
