"""Small tables as pandas frames."""

import pandas as pd
import pyarrow as pa


def frame(table: pa.Table) -> pd.DataFrame:
    """A frame with plain strings (objects, None for null), and times as nanoseconds."""
    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if pa.types.is_dictionary(field.type):
            columns[field.name] = pd.Series(column.cast(pa.string()).to_numpy(zero_copy_only=False), dtype=object)
        elif pa.types.is_timestamp(field.type):
            columns[field.name] = pd.Series(column.cast(pa.int64()).to_numpy())
        else:
            columns[field.name] = column.to_pandas()
    return pd.DataFrame(columns)
