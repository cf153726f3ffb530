"""The image files in the body of a request."""

from __future__ import annotations

from typing import NamedTuple

from python_multipart.multipart import Field, File, FormParser, parse_options_header

from teamnet_pl.errors import TeamNetError


class Upload(NamedTuple):
    """An image file.

    Attributes:
        name: Its name; None if it is the whole body.
        content: Its bytes, which are not trusted.
    """

    name: str | None
    content: bytes


def read_uploads(content_type: str, body: bytes, max_files: int) -> list[Upload]:
    """Takes the files out of a form (``multipart/form-data``); another body is one file.

    Args:
        content_type: The header of the request.
        body: The whole body.
        max_files: Largest number of files in a form.

    Raises:
        TeamNetError: If the form has no file or too many, or is malformed.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return [Upload(None, body)]
    uploads: list[Upload] = []
    ends: list[None] = []

    def keep(file: File) -> None:
        if len(uploads) == max_files:
            raise TeamNetError(f"The form has more than {max_files} files.")
        file.file_object.seek(0)
        name = (file.file_name or b"").decode(errors="replace")
        uploads.append(Upload(name, file.file_object.read()))

    def refuse(field: Field) -> None:
        name = (field.field_name or b"").decode(errors="replace")
        raise TeamNetError(
            f"The form has the field {name!r}, which is not a file; budgets are parameters of the "
            "address, such as /predict?budget_ms=20."
        )

    try:
        parser = FormParser(
            "multipart/form-data",
            refuse,
            keep,
            on_end=lambda: ends.append(None),
            boundary=options.get(b"boundary"),
            config={"MAX_MEMORY_FILE_SIZE": len(body)},
        )
        parser.write(body)
        parser.finalize()
    except TeamNetError:
        raise
    except ValueError as error:
        raise TeamNetError(f"The form is malformed: {error}.") from error
    if not ends:
        raise TeamNetError("The form is malformed: it has no end.")
    if not uploads:
        raise TeamNetError("The form has no file: curl -F image=@photo.jpg sends one.")
    return uploads
