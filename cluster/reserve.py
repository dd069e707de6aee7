"""Ask an autoscaling cluster for the nodes of a recipe, and wait until they are there:

    ray job submit -- python cluster/reserve.py RECIPE path=value ...

raydiff refuses a run that the cluster has no room for within 20 seconds, as Ray would wait for ever; a node with a GPU takes
minutes to come. The request stays until another one, so --release lets nodes go when they are idle.
"""

import argparse
import sys
import time

import raydiff
from raydiff import credentials, placement
from raydiff.plan.clusters import cluster_nodes


def wanted(run: raydiff.Run) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """A bundle of resources for each process that a run claims, and the labels of its node."""
    claims = [claim for claim in placement.claims(run, [placement.Node(1, 1)]) for _ in range(claim.replicas)]
    bundles = [{"CPU": claim.cpus, **({"GPU": claim.gpus} if claim.gpus else {})} for claim in claims]
    return bundles, [dict(claim.labels) for claim in claims]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="path=value")
    parser.add_argument("--release", action="store_true", help="ask for nothing any more")
    parser.add_argument("--minutes", type=float, default=20, help="how long to wait for the nodes")
    credentials.refuse_arguments(sys.argv[1:])
    arguments = parser.parse_args()
    run = raydiff.load(arguments.recipe, arguments.overrides)

    import ray
    from ray.autoscaler.sdk import request_resources

    ray.init(logging_level="ERROR", log_to_driver=False)
    bundles, labels = ([], []) if arguments.release else wanted(run)
    request_resources(bundles=bundles, bundle_label_selectors=labels)
    end = time.monotonic() + 60 * arguments.minutes
    while not arguments.release and (short := placement.faults(run, cluster_nodes(), "the cluster")):
        if time.monotonic() > end:
            print("\n".join(["still missing:", *short]), file=sys.stderr)
            return 1
        time.sleep(5)
    print("released" if arguments.release else f"{run.name}: its nodes are there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
