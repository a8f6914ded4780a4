"""A pipeline from keywords alone, as a test says them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from spark_fast.pipelines import LoaderOptions, Pipeline, View, build_pipeline

_OF_THE_VIEW = {field.name for field in fields(View)}


def build(data_path: Path | None, **keywords: object) -> Pipeline:
    """`build_pipeline` with LoaderOptions and their View made of `keywords`."""
    view = View(**{name: value for name, value in keywords.items() if name in _OF_THE_VIEW})  # type: ignore[arg-type]
    of_the_loader = {name: value for name, value in keywords.items() if name not in _OF_THE_VIEW}
    return build_pipeline(data_path, LoaderOptions(**of_the_loader, view=view))  # type: ignore[arg-type]
