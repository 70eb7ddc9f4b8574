# Sourced by the jobs of this folder that train. A training ends with one of four outcomes, told by its exit code:
#   0         the last step is done: so is the job
#   2         the user has to mend something, or it has diverged, said in one line: the job fails
#   STOPPED   a signal stopped it, with a checkpoint saved: two minutes before the time limit SLURM signals the script,
#             which passes it on; a preemption sends SIGTERM to the ranks alone. The job goes back into the queue
#   other     a failure: the job goes back into the queue, if it has not failed so MAX_FAILURES times without a new
#             checkpoint
# SLURM itself puts the job of a dead node back into the queue, which counts as a failure too.
STOPPED=75

# Of an array, a bare job number may stand for all of its tasks.
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# The number of lives in a row that neither ended in order nor saved a checkpoint of new steps. The training deletes the
# file when it has saved one.
failures_file=$SLURM_SUBMIT_DIR/slurm-$job.failures

# Trains with the arguments of launch/pretrain.py, and ends the job.
train_and_requeue() {
    local failures code step
    failures=$(($(cat "$failures_file" 2>/dev/null || echo 0) + 1)) # this life included, which may end without a word
    if [ "$failures" -gt "$MAX_FAILURES" ]; then
        echo "error: job $job failed $MAX_FAILURES times without a new checkpoint and does not start again; mend the" \
            "cause and submit it anew" >&2
        exit 1
    fi
    if ! echo "$failures" >"$failures_file" || [ ! -s "$failures_file" ]; then # else the job could go on for ever
        echo "error: $failures_file, which counts the failures of job $job, cannot be written: make room for it" >&2
        exit 1
    fi

    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
    stopping=
    trap 'stopping=1; scancel --signal=USR1 "$job"' USR1

    # In the background, because bash runs a trap only between commands.
    # srun does not take over --cpus-per-task by itself (since SLURM 22.05). Block: the ranks of one tensor group share
    # a node, for they have numbers that follow each other. When one rank has ended the others have half a minute to
    # say why they end too; killed at once (--kill-on-bad-exit=1), they would end with 143 and hide the first one's code.
    srun --kill-on-bad-exit=0 --wait=30 --distribution=block --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        python launch/pretrain.py --stopped-code "$STOPPED" --failures-file "$failures_file" "$@" &
    step=$!
    wait "$step"
    code=$?
    if [ -n "$stopping" ]; then # the trap ended the first wait
        wait "$step"
        code=$?
    fi

    case $code in
    0 | 2)
        rm -f "$failures_file"
        exit "$code"
        ;;
    "$STOPPED")
        rm -f "$failures_file"
        echo "job $job stopped before its last step: back into the queue"
        ;;
    *)
        if [ ! -e "$failures_file" ]; then
            echo "error: job $job failed with code $code after a new checkpoint: back into the queue" >&2
        elif [ "$failures" -lt "$MAX_FAILURES" ]; then
            echo "error: job $job failed with code $code, $failures of at most $MAX_FAILURES times without a new" \
                "checkpoint: back into the queue" >&2
        else
            echo "error: job $job failed with code $code, $failures times without a new checkpoint: not put back into" \
                "the queue" >&2
            exit "$code"
        fi
        ;;
    esac
    scontrol requeue "$job"
}
