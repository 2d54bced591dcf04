# shellcheck shell=bash
# Reads and checks the settings of a job: defaults, then a profile, then KEY=VALUE arguments of slurm/submit.

# All settings: NAME|default|type. Types are named in explain_type; a list with / is a choice. What each setting does is
# said in slurm/profiles/generic.env, which gives site-wide values. ROOT is the checkout.
SETTINGS=(
  "RUN||folder" "ENTRY||text" "PROFILE||text" "ARRAY||array" "CHECK|on|on/off" "JOB_NAME||text"
  "ACCOUNT||word" "PARTITION||word" "QOS||word" "TIME|24:00:00|time" "SBATCH_EXTRA||text" "SRUN_EXTRA||text"
  "NODES|1|nodes" "SPARE_NODES|0|count" "RANKS_PER_NODE|1|positive" "CPUS_PER_RANK|1|positive" "GPUS_PER_NODE|0|count"
  "PYTHON|$ROOT/.venv/bin/python|text" "HOST_PYTHON||text"
  "CONTAINER|none|none/pyxis/apptainer" "IMAGE||text" "MOUNTS||text"
  "SIGNAL_LEAD_S|300|count" "MAX_FAILURES|3|positive" "RETRY_DELAY_S|10|number" "HANG_S|600|duration"
  "START_S|1800|duration"
  "PREFLIGHT|full|full/nodes/off" "MIN_FREE_GIB|10|number" "CLOCK_TOLERANCE_S|5|number" "MIN_GIGABYTES_PER_S|0|number"
  "PREFLIGHT_TIMEOUT_S|300|duration"
)

# explain_type TYPE: sets WORDS and PATTERN to the values it allows. Whatever shell arithmetic reads must be a number
# here: arithmetic runs the commands inside a value such as a[$(date)].
explain_type() {
  local number='[0-9]{1,9}(\.[0-9]{1,9})?'
  case $1 in
    count) PATTERN='0|[1-9][0-9]{0,8}'; WORDS="a whole number from 0, such as 8" ;;
    positive) PATTERN='[1-9][0-9]{0,8}'; WORDS="a whole number from 1, such as 8" ;;
    number) PATTERN=$number; WORDS="a number from 0, such as 10 or 0.5" ;;
    duration) PATTERN=$number; WORDS="a number of seconds above 0, such as 600" ;;
    nodes) PATTERN='[1-9][0-9]{0,8}(-[1-9][0-9]{0,8})?'
      WORDS="a whole number from 1, or a range from fewest to most, such as 2-4" ;;
    time) PATTERN='[1-9][0-9]*|[0-9]+:[0-9]{2}(:[0-9]{2})?|[0-9]+-[0-9]{1,2}(:[0-9]{2}){0,2}|UNLIMITED|INFINITE'
      WORDS="one of sbatch's times, such as 90 (minutes), 24:00:00 or 2-12 (days-hours)" ;;
    array) PATTERN='([0-9]+(-[0-9]+(:[0-9]+)?)?(,[0-9]+(-[0-9]+)?)*(%[0-9]+)?)?'
      WORDS="task numbers as for sbatch --array, such as 0-15 or 0-15%4" ;;
    word) PATTERN='[A-Za-z0-9_.,@:+-]*'; WORDS="one name without spaces" ;;
    # Slurm replaces %j and the like in the path of the job's log, and \ ends that.
    folder) PATTERN='[^%\\]*'; WORDS="a path without % and \\" ;;
    text) PATTERN='.*'; WORDS="one line of text" ;;
    *) PATTERN=${1//\//|}; WORDS="one of ${1//\// }" ;;
  esac
}

setting_names() { printf '%s\n' "${SETTINGS[@]%%|*}"; }

is_setting() {
  local each
  for each in "${SETTINGS[@]}"; do [[ ${each%%|*} == "$1" ]] && return; done
  return 1
}

# nearest WORD CANDIDATE...: "; did you mean CANDIDATE?" for the one with the fewest edits, when they are few.
nearest() {
  local word=$1
  shift
  printf '%s\n' "$@" | awk -v word="$word" '
    function least(x, y) { return x < y ? x : y }
    function edits(a, b,   i, j, d) {
      for (i = 0; i <= length(a); i++) d[i, 0] = i
      for (j = 0; j <= length(b); j++) d[0, j] = j
      for (i = 1; i <= length(a); i++) for (j = 1; j <= length(b); j++)
        d[i, j] = least(least(d[i-1, j], d[i, j-1]) + 1, d[i-1, j-1] + (substr(a, i, 1) != substr(b, j, 1)))
      return d[length(a), length(b)]
    }
    { found = edits(word, $0); if (NR == 1 || found < fewest) { fewest = found; best = $0 } }
    END { if (fewest <= 1 + length(word) / 4) printf "; did you mean %s?", best }'
}

# load_settings: sets every setting, and MIN_NODES and MAX_NODES; fails with a line for each wrong value.
load_settings() {
  local each key rest profile=${PROFILE:-generic} overrides=${ANYEXPERTS_SETTINGS:-}
  for each in "${SETTINGS[@]}"; do
    rest=${each#*|}
    printf -v "${each%%|*}" %s "${rest%|*}"
  done
  while IFS= read -r each; do
    # A job whose profile is refused still has to say so in its run directory.
    case $each in PROFILE=*) profile=${each#*=} ;; RUN=*) RUN=${each#*=} ;; esac
  done <<<"$overrides"
  [[ $profile == */* ]] || profile=$ROOT/slurm/profiles/$profile.env
  [[ -r $profile ]] || { echo "no profile $profile; PROFILE is a name in slurm/profiles or a path" >&2; return 2; }
  source_profile "$profile" || return
  PROFILE=$profile
  while IFS= read -r each; do
    [[ -z $each ]] && continue
    key=${each%%=*}
    # Not any variable: PATH=... would reach this script itself.
    is_setting "$key" || {
      mapfile -t rest < <(setting_names)
      echo "unknown setting $each$(nearest "$key" "${rest[@]}"); settings are ${rest[*]}, explained in" \
        "slurm/profiles/generic.env and slurm/submit --help; other variables reach the ranks when a profile exports" \
        "them" >&2
      return 2
    }
    [[ $key == PROFILE ]] || printf -v "$key" %s "${each#*=}"
  done <<<"$overrides"
  HOST_PYTHON=${HOST_PYTHON:-$PYTHON}
  check_settings || return
  # shellcheck disable=SC2034,SC2153 # lib.sh reads them; NODES is one of SETTINGS
  MIN_NODES=${NODES%-*} MAX_NODES=${NODES#*-}
}

# source_profile FILE: refuses typing errors: bad syntax, a word that is no command (HANG_S= 600), and a variable in
# capitals that is neither a setting nor exported.
source_profile() {
  local before name names strangers wrong=0
  bash -n "$1" || return 2
  before=" $(compgen -v | tr '\n' ' ')"
  strangers=$(mktemp)
  # shellcheck disable=SC2317 # bash calls it, in a process of its own
  command_not_found_handle() { echo "$1" >>"$strangers"; }
  # shellcheck source=/dev/null
  source "$1"
  unset -f command_not_found_handle
  while IFS= read -r name; do
    printf '%q in %s is no command; write NAME=value without spaces around =\n' "$name" "$1" >&2
    wrong=2
  done <"$strangers"
  rm -f "$strangers"
  mapfile -t names < <(setting_names)
  for name in $(compgen -v); do
    [[ $before == *" $name "* || ! $name =~ ^[A-Z][A-Z0-9_]*$ || $name =~ ^(BASH_|PIPESTATUS$) ]] && continue
    [[ ${!name@a} == *x* ]] && continue
    echo "unknown setting $name in $1$(nearest "$name" "${names[@]}"); a variable for the ranks is exported" >&2
    wrong=2
  done
  return "$wrong"
}

check_settings() {
  local each name type value PATTERN WORDS wrong=0
  for each in "${SETTINGS[@]}"; do
    name=${each%%|*} type=${each##*|}
    value=${!name}
    explain_type "$type"
    [[ $value =~ ^($PATTERN)$ && $value != *[[:cntrl:]]* && ! ($type == duration && $value =~ ^[0.]*$) ]] && continue
    printf '%s=%q is not %s; see slurm/profiles/generic.env and slurm/submit --help\n' "$name" "$value" "$WORDS" >&2
    wrong=2
  done
  ((wrong)) && return "$wrong"
  if ((${NODES%-*} > ${NODES#*-})); then
    echo "NODES=$NODES runs backwards; write ${NODES#*-}-${NODES%-*}" >&2
    wrong=2
  fi
  if ((GPUS_PER_NODE > 0 && RANKS_PER_NODE > GPUS_PER_NODE)); then
    echo "RANKS_PER_NODE=$RANKS_PER_NODE is more than GPUS_PER_NODE=$GPUS_PER_NODE; each rank needs a GPU" >&2
    wrong=2
  fi
  if ((SIGNAL_LEAD_S > 65535)); then
    echo "SIGNAL_LEAD_S=$SIGNAL_LEAD_S is more than 65535, the most that sbatch --signal takes" >&2
    wrong=2
  fi
  if [[ $CONTAINER != none && $RUN == *[:,]* ]]; then
    echo "RUN=$RUN contains : or , which the list of a container's mounts cannot hold; rename the folder" >&2
    wrong=2
  fi
  return "$wrong"
}
