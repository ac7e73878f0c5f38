"""Reshapes whose new shape is put together while the model runs become reshapes to a constant, where that says the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def settle_reshapes(model: ir.Model) -> None:
    """Give a ``Reshape`` that keeps its leading dynamic axes a constant shape: 0 stands for "as it is".

    The exporter reads each dynamic axis from an input and joins the axes to a shape before every reshape: three to five small
    operators each time, which count where a model reads one sentence.
    """
    taken = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    taken |= {value.name for node in ir.traversal.RecursiveGraphIterator(model.graph) for value in node.outputs}
    shapes: dict[tuple[int, ...], ir.Value] = {}
    for node in model.graph:
        if node.op_type != "Reshape" or node.domain != "" or node.inputs[0] is None:
            continue
        if node.inputs[1] is not None and node.inputs[1].const_value is not None:
            continue
        target = _constant_shape(node.inputs[0].shape, node.outputs[0].shape)
        if target is None:
            continue
        if target not in shapes:
            name = "shape_" + "_".join(map(str, target))
            while name in taken:
                name += "_"
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(target)]))
            value.const_value = ir.tensor(np.array(target, dtype=np.int64), name=name)
            model.graph.initializers[name] = value
            shapes[target] = value
        node.replace_input_with(1, shapes[target])
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _constant_shape(given: ir.Shape | None, wanted: ir.Shape | None) -> tuple[int, ...] | None:
    """The shape as a constant: sizes that are known, 0 for a dynamic axis in its place; None: there is another dynamic axis,
    or a known size is 0."""
    if given is None or wanted is None:
        return None
    target = []
    for axis, size in enumerate(wanted):
        if isinstance(size, int):
            if size == 0:
                return None
            target.append(size)
        elif axis < len(given) and size.value is not None and size == given[axis]:
            target.append(0)
        else:
            return None
    return tuple(target)
