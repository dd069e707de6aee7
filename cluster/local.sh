#!/usr/bin/env bash
# A Ray cluster of four nodes on this machine: a head, and one node for each pool, labelled as on a real cluster.
#
# GPUs: none; the nodes declare CPUs, which Ray only counts. To try labels, jobs and authentication before they cost money.
# Cost: four times Ray's own processes, about 3 GB of memory; no GPU. Ray listens on every interface, and asks for the token.
# Sized for: jobs/recipes/emoji_draft_lv_pools.toml, with pools.train.labels.raydiff-pool=train and so on, or without labels.
# To edit: nothing; the options below.
#
#   cluster/local.sh [--train CPUS] [--generate CPUS] [--reward CPUS] [--port BASE]
#
# It prints the environment for other terminals, then waits; Ctrl-C stops what it started, by process id, and nothing else.
set -euo pipefail
set -m # each node in a process group of its own; else its jobs would inherit that a shell's background ignores Ctrl-C

die() {
  echo "local.sh: $1" >&2
  exit 2
}

declare -A cpus=([train]=1 [generate]=1 [reward]=1)
base=6400 # GCS; the dashboard and the nodes' agents follow it, below the workers' ports
while (($#)); do
  case $1 in
    --train | --generate | --reward) cpus[${1#--}]=${2:?"$1 needs a number of CPUs"} ;;
    --port) base=${2:?"--port needs a number"} ;;
    *) die "unknown argument $1; it takes --train, --generate, --reward and --port, each with a number" ;;
  esac
  [[ $2 =~ ^[0-9]+$ ]] || die "$1 takes a whole number, not $2"
  shift 2
done
((base >= 1024 && base <= 9950)) || die "--port $base: take 1024 to 9950; 50 ports are used, and workers have those from 10002"
command -v ray >/dev/null || die "there is no ray on PATH; activate the environment that raydiff is installed in"
for port in $base $((base + 1)) $((base + 2)); do
  if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then die "port $port is taken; give another --port"; fi
done

umask 077
scratch=$(mktemp -d /tmp/raydiff.XXXXXX) # short: Ray's socket paths below it may have 107 characters
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$scratch/token
unset RAY_AUTH_TOKEN RAY_ADDRESS RAY_API_SERVER_ADDRESS # they would come before what this cluster is given
head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
export RAY_worker_niceness=${RAY_worker_niceness:-0} # Ray's own 15 starves workers on a machine that others use
export RAY_raylet_start_wait_time_s=${RAY_raylet_start_wait_time_s:-120} # Ray gives up on a busy machine after 30

pids=()
stop() {
  trap - EXIT
  trap '' INT TERM # a second Ctrl-C must not leave half of it
  if ((${#pids[@]})); then
    kill -TERM "${pids[@]}" 2>/dev/null || true
    for _ in {1..60}; do
      kill -0 "${pids[@]}" 2>/dev/null || break
      sleep 0.5
    done
    kill -KILL "${pids[@]}" 2>/dev/null || true # Ray's reaper then ends what they had started
    wait "${pids[@]}" 2>/dev/null || true
  fi
  rm -rf "$scratch"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Each node has worker ports of its own: on one machine, nodes with Ray's default range hand out the same ones. And a folder of
# its own: in a shared one, the second node to unpack a job's files deletes them under the first one's driver.
node() { # node NUMBER NAME ARGUMENT...: start one in the background
  local number=$1 name=$2
  shift 2
  ray start --block --disable-usage-stats --node-ip-address=127.0.0.1 --temp-dir="$scratch/$name" --num-gpus=0 \
    --object-store-memory=$((256 << 20)) \
    --min-worker-port=$((10002 + 2000 * number)) --max-worker-port=$((12001 + 2000 * number)) \
    --node-manager-port=$((base + 10 + 10 * number)) --object-manager-port=$((base + 11 + 10 * number)) \
    --dashboard-agent-listen-port=$((base + 12 + 10 * number)) --dashboard-agent-grpc-port=$((base + 13 + 10 * number)) \
    --runtime-env-agent-port=$((base + 14 + 10 * number)) --metrics-export-port=$((base + 15 + 10 * number)) \
    "$@" >"$scratch/$name.log" 2>&1 &
  pids+=($!)
}
started() { # started NAME PID: wait until it says so
  until grep -qs "Ray runtime started" "$scratch/$1.log"; do
    if ! kill -0 "$2" 2>/dev/null; then
      echo "local.sh: node $1 did not start:" >&2
      tail -n 20 "$scratch/$1.log" >&2
      exit 1
    fi
    sleep 0.5
  done
}

# The head has no CPUs, so that everything goes to a pool's node; the drivers of jobs claim none.
node 0 head --head --port="$base" --dashboard-host=127.0.0.1 --dashboard-port=$((base + 1)) \
  --ray-client-server-port=$((base + 2)) --include-dashboard=true --num-cpus=0
started head "${pids[0]}"
number=1
for pool in train generate reward; do # one after the other: nodes that start at once in one folder take each other's sockets
  # One log monitor for the machine, the head's: more would print each line several times.
  node "$number" "$pool" --address="127.0.0.1:$base" --num-cpus="${cpus[$pool]}" --labels="raydiff-pool=$pool" \
    --include-log-monitor=false
  started "$pool" "${pids[$number]}"
  number=$((number + 1))
done

cat <<END
export RAY_ADDRESS=127.0.0.1:$base
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$((base + 1))
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH
# ready: ${cpus[train]} CPUs to train, ${cpus[generate]} to generate, ${cpus[reward]} for rewards; Ctrl-C stops it
END

wait -n "${pids[@]}" || true # nodes end only when something is wrong
echo "local.sh: a node has ended, so all are stopped; the end of their logs:" >&2
tail -n 5 "$scratch"/*.log >&2
exit 1
