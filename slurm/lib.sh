# shellcheck shell=bash
# Shared by the batch scripts and by slurm/submit.

# Programs by kind of job, relative to the checkout; the setting ENTRY replaces them.
# shellcheck disable=SC2034 # the scripts that source this file read it
declare -A ENTRIES=([pretrain]=pretrain/pretrain_multimodal.py [instruct_tune]=pretrain/instruct_tune.py)

# shellcheck source=slurm/settings.sh
source "$ROOT/slurm/settings.sh"

# srun_command COUNT NODELIST NAME RANKS_PER_NODE [OPTION ...]: fills the array SRUN; a command appended to it runs in
# every rank.
srun_command() {
  local mounts="$ROOT:$ROOT${RUN:+,$RUN:$RUN}${MOUNTS:+,$MOUNTS}" extra
  read -ra extra <<<"$SRUN_EXTRA"
  # One dead rank ends all of them at once: the others would wait for it inside a collective until it times out.
  SRUN=(srun "--job-name=$3" "--nodes=$1" "--nodelist=$2" "--ntasks=$(($1 * $4))" "--ntasks-per-node=$4"
        "--cpus-per-task=$CPUS_PER_RANK" "--chdir=$ROOT" --kill-on-bad-exit=1)
  # Every rank sees all GPUs of its node and picks its own by LOCAL_RANK, as NCCL's peer-to-peer paths require.
  ((GPUS_PER_NODE)) && SRUN+=("--gpus-per-node=$GPUS_PER_NODE" --gpu-bind=none)
  SRUN+=("${@:5}" "${extra[@]}")
  case $CONTAINER in
    none) SRUN+=("$ROOT/slurm/rank.sh") ;;
    pyxis) SRUN+=("--container-image=$IMAGE" "--container-mounts=$mounts" "--container-workdir=$ROOT"
                  "$ROOT/slurm/rank.sh") ;;
    apptainer)
      SRUN+=("$ROOT/slurm/rank.sh" apptainer exec --bind "$mounts" --pwd "$ROOT")
      ((GPUS_PER_NODE)) && SRUN+=(--nv)
      SRUN+=("$IMAGE") ;;
  esac
}

survival() { # HOST_PYTHON may be several words, such as "apptainer exec image.sif python"
  local words
  read -ra words <<<"$HOST_PYTHON"
  (cd "$ROOT" && exec "${words[@]}" -m megatron_anyexperts.survival "$@")
}

# wait_for PID: its exit code, however many trapped signals arrive meanwhile.
wait_for() {
  local code
  while :; do
    wait "$1" && code=0 || code=$?
    ((code > 128)) && kill -0 "$1" 2>/dev/null && continue
    return "$code"
  done
}

address_of() { # a node's name need not resolve; the address that Slurm itself uses does
  scontrol show node -o "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# on_every_node NODE...: runs the survival command in COMMAND once on each, its output into the file REPORTS; fails when
# the job was asked to stop meanwhile, which leaves the reports without meaning.
on_every_node() {
  local nodes
  nodes=$(IFS=,; echo "$*")
  srun_command $# "$nodes" preflight 1 --kill-on-bad-exit=0 # a node that fails must not silence the others
  MASTER_ADDR=$(address_of "$1") timeout "$PREFLIGHT_TIMEOUT_S" \
    "${SRUN[@]}" "$PYTHON" -m megatron_anyexperts.survival "${COMMAND[@]}" >"$REPORTS" &
  PREFLIGHT_PID=$!
  # Not judged by its exit code: a node that failed or kept silent is missing from the reports and named for it.
  wait_for "$PREFLIGHT_PID" || true
  PREFLIGHT_PID=""
  # A job that is being requeued or cancelled loses its steps, whose silence is then no node's fault.
  local state
  state=$(squeue -h -j "$SLURM_JOB_ID" -o %T) && [[ $state != RUNNING ]] && SIGNALLED=${SIGNALLED:-terminated}
  [[ -z $SIGNALLED ]]
}

# preflight NODE...: sets GOOD to the nodes that are fit; fails after one line when they are too few. Asked to stop
# meanwhile, it succeeds with SIGNALLED set.
preflight() {
  local code=0 REPORTS
  GOOD=("$@")
  [[ $PREFLIGHT == off ]] && return
  REPORTS=$(mktemp)
  leave_out_the_unfit || code=$?
  rm -f "$REPORTS"
  return "$code"
}

leave_out_the_unfit() { # takes them out of GOOD
  local asked reply COMMAND
  asked=$(date +%s.%N)
  COMMAND=(probe "$RUN" --gpus "$GPUS_PER_NODE")
  on_every_node "${GOOD[@]}" || return 0
  reply=$(survival judge "$RUN" --nodes "${GOOD[*]}" --reports "$REPORTS" --least "$MIN_NODES" \
    --gpus "$GPUS_PER_NODE" --free-gib "$MIN_FREE_GIB" --clock-tolerance-s "$CLOCK_TOLERANCE_S" \
    --asked-at "$asked" --heard-at "$(date +%s.%N)" --reference "$SLURMD_NODENAME") || return
  read -ra GOOD <<<"$reply"
  if [[ $PREFLIGHT == full ]] && ((${#GOOD[@]} > 1)); then
    COMMAND=(all-reduce --timeout-s "$PREFLIGHT_TIMEOUT_S")
    on_every_node "${GOOD[@]}" || return 0
    reply=$(survival judge-bandwidth "$RUN" --nodes "${GOOD[*]}" --reports "$REPORTS" --least "$MIN_NODES" \
      --least-rate "$MIN_GIGABYTES_PER_S") || return
    read -ra GOOD <<<"$reply"
  fi
}

# train_once NODE...: one attempt on these nodes; sets CODE to srun's exit code.
train_once() {
  local nodes step watchdog errors_pipe tee_pid
  nodes=$(IFS=,; echo "$*")
  step=train-${SLURM_RESTART_COUNT:-0}-$ATTEMPT
  srun_command $# "$nodes" "$step" "$RANKS_PER_NODE"
  : >"$STEP_ERRORS"
  exec {errors_pipe}> >(exec tee -a "$STEP_ERRORS" >&2)
  tee_pid=$!
  MASTER_ADDR=$(address_of "$1") "${SRUN[@]}" "$PYTHON" "$ENTRY" "${TRAINING[@]}" 2>&"$errors_pipe" &
  TRAIN_PID=$!
  exec {errors_pipe}>&-
  survival watch "$RUN" --ranks $(($# * RANKS_PER_NODE)) --hang-s "$HANG_S" --start-s "$START_S" \
    --srun-pid "$TRAIN_PID" --job "$SLURM_JOB_ID" --step-name "$step" &
  watchdog=$!
  wait_for "$TRAIN_PID" && CODE=0 || CODE=$?
  TRAIN_PID=""
  wait_for "$tee_pid" || true
  # It ends by itself, within its polling interval; waiting for it keeps the order of the events.
  wait_for "$watchdog" || true
}

# ask_to_stop REASON: have every rank save at the next step boundary and exit.
ask_to_stop() {
  SIGNALLED=${SIGNALLED:-$1}
  # Not through srun: on a SIGTERM it ends the step at once. scancel reaches the ranks of the running step alone.
  if [[ -n $TRAIN_PID ]]; then scancel --signal=TERM "$SLURM_JOB_ID" || true; fi
  if [[ -n $PREFLIGHT_PID ]]; then kill "$PREFLIGHT_PID" 2>/dev/null || true; fi
}

# begin_job KIND: settings and run directory. Whatever then ends the job without success is told in the run's events, a
# profile that was spoilt while the job waited in the queue included.
begin_job() {
  STOP_REASON="" DEFAULT_RUN=$ROOT/runs/$1
  trap 'account_for $?' EXIT
  load_settings
  ENTRY=${ENTRY:-${ENTRIES[$1]}} RUN=${RUN:-$DEFAULT_RUN}
  mkdir -p "$RUN/logs"
}

# account_for CODE: a job that ends without success has said why in the run's events.
account_for() {
  (($1)) || return 0
  RUN=${RUN:-$DEFAULT_RUN} HOST_PYTHON=${HOST_PYTHON:-$PYTHON}
  survival account "$RUN" --summary "${STOP_REASON:-the batch script ended with exit code $1; the end of its log says why}" || true
}

# run_training ARG...: the life of one job: preflight, train, judge, and again, until it is done or given up.
run_training() {
  local all reply usable layout_flags
  TRAIN_PID="" PREFLIGHT_PID="" SIGNALLED="" ATTEMPT=0
  TRAINING=("$@")
  STEP_ERRORS=$RUN/logs/step-$SLURM_JOB_ID.err
  # Time limit: Slurm sends USR1 to this script SIGNAL_LEAD_S before it. Preemption and scancel --batch send TERM.
  trap 'ask_to_stop "time limit"' USR1
  trap 'ask_to_stop terminated' TERM
  mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  while :; do
    survival begin "$RUN" --job "$SLURM_JOB_ID" --restart "${SLURM_RESTART_COUNT:-0}" --nodes "${all[*]}"
    CODE=0
    if [[ -z $SIGNALLED ]]; then
      preflight "${all[@]}" || return 1
    fi
    if [[ -z $SIGNALLED ]]; then
      usable=$((${#GOOD[@]} < MAX_NODES ? ${#GOOD[@]} : MAX_NODES))
      reply=$(survival fit "$RUN" --available "$usable" --ranks-per-node "$RANKS_PER_NODE" --least "$MIN_NODES" \
        -- "$@") || return 1
      read -r usable layout_flags <<<"$reply"
      read -ra layout_flags <<<"$layout_flags"
      TRAINING=("$@" "${layout_flags[@]}")
    fi
    [[ -z $SIGNALLED ]] && train_once "${GOOD[@]:0:usable}"
    reply=$(survival end "$RUN" --exit-code "$CODE" --signalled "$SIGNALLED" --step-errors "$STEP_ERRORS" \
      --restart "${SLURM_RESTART_COUNT:-0}" --max-failures "$MAX_FAILURES")
    case $reply in
      finish) return 0 ;;
      retry) ATTEMPT=$((ATTEMPT + 1)); sleep "$RETRY_DELAY_S" & wait_for $! || true ;;
      requeue)
        # A job that its owner has cancelled stays cancelled: requeueing would revive it.
        [[ $(squeue -h -j "$SLURM_JOB_ID" -t RUNNING -o %i) ]] || {
          STOP_REASON="the job was cancelled or requeued by hand; a requeued one goes on"
          return 1
        }
        scontrol requeue "$SLURM_JOB_ID"
        trap - EXIT
        # Slurm ends this script now; leaving by itself would race with that and might read as completion.
        sleep 60 & wait_for $! || true
        return 1 ;;
      *) trap - EXIT # it has said why, in its own words
        return 1 ;;
    esac
  done
}
