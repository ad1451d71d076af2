"""Anybody can lift one function: each method function runs alone in a file that imports torch."""
import ast

import pytest
import torch

from conftest import ROOT

x, eps, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1
times = torch.tensor([80.0, 9.0, 1.0, 0.1], dtype=torch.float64)
shrink = lambda x, t, y=None: x / (1 + t)[:, None, None, None]
jump = lambda z, r, t, y=None: z * (1 + t - r)[:, None, None, None]
cov = torch.eye(3) + 1

CALLS = {
    "pretrain.edm_loss": (shrink, x, eps, t, None),
    "pretrain.flow_loss": (jump, x, eps, t, None),
    "solve.log_uniform_times": (16,),
    "solve.karras_times": (16,),
    "solve.uniform_times": (16,),
    "solve.dpm_solver_pp": (shrink, x, times),
    "solve.euler": (shrink, x, times),
    "solve.heun": (shrink, x, times),
    "solve.flow_map": (jump, x, times),
    "solve.guided": (shrink, jump, 2.0),
    "solve.edm_to_flow": (x, times),
    "solve.without_label": (shrink, 10),
    "midtrain.cmt_loss": (shrink, x, t, eps, None, lambda a, b: (a - b).flatten(1).norm(dim=1)),
    "midtrain.cmt_meanflow_loss": (jump, x, t, eps, 0.5 * t, None),
    "midtrain.l2": (x, eps),
    "midtrain.huber": (x, eps),
    "midtrain.pair_table": (3, "mf"),
    "midtrain.gather_pairs": (torch.randn(4, 5, 1, 8, 8), times, torch.arange(5), torch.arange(15),
                              torch.arange(3), torch.full((3,), 3)),
    "midtrain.draw_pair_indices": (5, 2, 3, "cpu"),
    "posttrain_cm.consistency_loss": (shrink, x, 0.9 * x, t, 0.9 * t, None, 1 / t, 0.06),
    "posttrain_cm.ect_loss": (shrink, x, eps, t, 0.9 * t, None, 1 / t, 0.0),
    "posttrain_cm.ecd_loss": (shrink, x, eps, t, 0.9 * t, None, 1 / t, 0.06, shrink),
    "posttrain_cm.ode_step": (shrink, x, t, 0.9 * t, None),
    "posttrain_cm.ect_r": (t, 256, 0),
    "posttrain_cm.ect_weight": (t, 0.9 * t, "denoising"),
    "posttrain_mf.meanflow_loss": (jump, x, 0.5 * t, t, None, eps, 0),
    "posttrain_mf.derivative_jvp": (jump, x, 0.5 * t, t, None, eps),
    "posttrain_mf.derivative_difference": (jump, x, 0.5 * t, t, None, eps),
    "posttrain_mf.guided_velocity": (jump, x, t, torch.arange(4), eps, 0.2, 0.9, 3),
    "posttrain_mf.drop_labels_where_equal": (torch.arange(4), t > 0.5, 0.1, 3),
    "posttrain_mf.sample_r_t": (8, 0.25, -0.4, 1.0, "cpu"),
    "sample.consistency_sampler": (shrink, torch.stack([x, eps]), [80.0, 0.8], None),
    "sample.geometric_times": (2, 80.0, 0.8),
    "sample.draw_block": (0, 2, (1, 8, 8), 10),
    "fid.frechet_distance": (torch.zeros(3), cov, torch.ones(3), cov),
    "fid.sums": ([torch.randn(9, 3), torch.randn(9, 3)],),
    "fid.moments": (9, torch.ones(3), 9 * cov),
}


def method_functions():
    for stage in ("pretrain", "solve", "midtrain", "posttrain_cm", "posttrain_mf", "sample", "fid"):
        source = (ROOT / f"{stage}.py").read_text()
        _, _, method = source.partition("# === the method ===")
        method = method.partition("\n# ===")[0]
        for node in ast.parse(method[method.index("\n"):]).body:
            assert isinstance(node, ast.FunctionDef), f"{stage}.py: only functions stand under 'the method'"
            yield f"{stage}.{node.name}", ast.unparse(node), node.end_lineno - node.lineno + 1


FUNCTIONS = list(method_functions())


def test_every_method_function_is_tried_here():
    assert {name for name, _, _ in FUNCTIONS} == set(CALLS)


@pytest.mark.parametrize("name, source, lines", FUNCTIONS, ids=[name for name, _, _ in FUNCTIONS])
def test_runs_alone_and_is_short(name, source, lines):
    """Except ECT's and ECD's losses, which are pasted together with what they call."""
    space, sources = {}, {name: source for name, source, _ in FUNCTIONS}
    needs = {"posttrain_cm.ect_loss": ["consistency_loss"],
             "posttrain_cm.ecd_loss": ["consistency_loss", "ode_step"]}.get(name, [])
    source = "\n".join([source, *(sources[f"posttrain_cm.{needed}"] for needed in needs)])
    exec("import torch\n" + source, space)
    assert space[name.split(".")[1]](*CALLS[name]) is not None
    assert lines <= 35 if name == "solve.dpm_solver_pp" else lines <= 30
