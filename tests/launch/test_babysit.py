"""babysit.sh through what can happen to a run: each test is one thing that goes wrong in the stand-in cloud."""

import os
import re
import signal
import time

import pytest

CONFIG = "configs/a.yaml"


def states(said: str) -> list[str]:
    """The states that were told, one after another; every line of stdout tells a transition from one to the next."""
    lines = said.splitlines()
    told = [re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ babysit: (.+) -> (.+?): .+", line) for line in lines]
    assert all(told), said
    pairs = [match.groups() for match in told if match]
    assert [before for before, _ in pairs] == ["begin", *(after for _, after in pairs[:-1])]
    return [after for _, after in pairs]


def babysit(cloud, *words: str, **env: str) -> tuple[int, list[str], str]:
    """Run it to its end: exit code, states, and all that was said."""
    done = cloud.call("babysit.sh", CONFIG, *words, **env)
    return done.returncode, states(done.stdout), done.stdout + done.stderr


def calm(seen: list[str]) -> list[str]:
    """The states without those that depend on how quick the machine is."""
    return [state for state in seen if state not in ("running", "unstarted", "lost")]


def until(condition, cloud) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, cloud.said()
        time.sleep(0.02)


START = ["missing", "sync", "setup", "run"]  # a run on machines that have nothing yet
PREEMPTED = ["gone", "deleting", "absent", "requested"]


def test_a_run_that_is_done(cloud):
    for worker in (0, 1):
        cloud.plan(worker, "step=1 save=1 exit=0")
    code, seen, said = babysit(cloud, "--loss.beta", "0.05")
    assert (code, calm(seen)) == (0, ["absent", "requested", *START, "finished", "kept"])
    assert "billed until launch/delete.sh" in said
    assert cloud.verbs("create", "delete") == ["create"]
    assert cloud.home(0).joinpath("called").read_text().splitlines()[-2:] == ["--loss.beta", "0.05"]

    code, seen, _ = babysit(cloud)  # what is done is not started again
    assert (code, seen) == (0, ["finished", "kept"])
    assert len(cloud.starts) == 2


def test_a_run_that_is_done_and_deleted(cloud):
    for worker in (0, 1):
        cloud.plan(worker, "step=1 exit=0")
    code, seen, said = babysit(cloud, DELETE_WHEN_DONE="1")
    assert (code, calm(seen)) == (0, ["absent", "requested", *START, "finished", "deleting", "deleted"])
    assert "billed until" not in said
    assert not (cloud.root / "request").exists()


def test_a_wait_in_the_queue(cloud):
    cloud.next("create", "queue")
    for worker in (0, 1):
        cloud.plan(worker, "exit=0")
    code, seen, said = babysit(cloud)
    assert (code, calm(seen)) == (0, ["absent", "requested", *START, "finished", "kept"])
    assert said.index("WAITING_FOR_RESOURCES") < said.index("PROVISIONING") < said.index("ACTIVE")


@pytest.mark.slow
def test_a_request_found_in_the_queue_is_waited_for(cloud):
    (cloud.root / "request").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nFAILED\n")
    for worker in (0, 1):
        cloud.plan(worker, "exit=0")
    code, seen, _ = babysit(cloud)
    assert (code, calm(seen)) == (0, ["waiting", *PREEMPTED, *START, "finished", "kept"])


def test_a_slice_that_is_there_is_used(cloud):
    cloud.call("create.sh")
    for worker in (0, 1):
        cloud.plan(worker, "exit=0")
    code, seen, _ = babysit(cloud)
    assert (code, calm(seen)) == (0, [*START, "finished", "kept"])
    assert cloud.verbs("create") == ["create"]


@pytest.mark.parametrize("place", ["bucket", "share"])
def test_a_slice_that_is_preempted_in_the_midst_of_a_run(cloud, place):
    if place == "share":
        cloud.share()
    cloud.plan(0, "step=10 save=10 pause=0.3 preempt", "step=20 pause=0.3 preempt", "step=30 exit=0")
    cloud.plan(1, "wait", "wait", "exit=0")
    code, seen, _ = babysit(cloud)
    made = ["absent", "requested", *START]
    done = [state for state in calm(seen) if state not in ("gone", "broken", "halting")]  # whichever was noticed first
    assert code == 0
    assert done == [*made, "deleting", *made, "deleting", *made, "finished", "kept"]
    assert cloud.verbs("create", "delete") == ["create", "delete", "create", "delete", "create"]
    assert cloud.starts.count("dpo/0") == cloud.starts.count("dpo/1") == 3


def test_a_run_that_the_bucket_says_is_done_gets_no_slice(cloud):
    cloud.plan(0, "step=1 save=1 end preempt")  # before anybody saw its exit code
    code, seen, said = babysit(cloud, DELETE_WHEN_DONE="1")
    assert (code, calm(seen)[-3:]) == (0, ["finished", "deleting", "deleted"])
    assert "finished: gs://bucket/runs/first: done at " in said
    assert cloud.verbs("create", "delete") == ["create", "delete"]

    code, seen, said = babysit(cloud)  # and now there is no slice at all
    assert (code, seen) == (0, ["finished", "deleted"])
    assert "billed until" not in said
    assert cloud.verbs("create") == ["create"]


def test_a_run_that_was_killed_while_it_wrote_its_end_writes_it_again(cloud):
    cloud.plan(0, "step=1 save=1 ending preempt", "exit=0")
    cloud.plan(1, "wait", "exit=0")
    code, seen, _ = babysit(cloud)
    assert (code, calm(seen)[-6:]) == (0, [*START, "finished", "kept"])
    assert cloud.verbs("create") == ["create", "create"]


def test_what_a_restart_will_not_cure_is_known_when_the_slice_is_gone(cloud):
    cloud.plan(0, "step=3 save=3 error=43 preempt", "exit=0")
    cloud.plan(1, "wait", "exit=0")
    code, seen, said = babysit(cloud)
    assert (code, calm(seen)[-2:]) == (43, ["final", "stopped"])
    assert "with exit code 43: this is " in said
    assert '{"step": 3, "loss": 1}' in said  # logs.sh, from the bucket
    assert cloud.verbs("create") == ["create"]
    cloud.next("describe", "1")  # nor does gcloud answer at first
    assert babysit(cloud)[0] == 0  # the cause is gone, as far as who starts it again knows
    assert cloud.verbs("create") == ["create", "create"]


def test_a_bucket_that_cannot_be_read_decides_nothing(cloud):
    cloud.storage.put("bucket", "runs/first/events.jsonl", b'{"event": "end", "time": 1.5}\n')
    cloud.storage.fail(403, kind="read list")
    for worker in (0, 1):
        cloud.plan(worker, "step=1 exit=0")
    code, seen, said = babysit(cloud)
    assert (code, calm(seen)) == (0, ["absent", "requested", *START, "finished", "kept"])
    assert (
        said.count("gs://bucket/runs/first: cannot be read: HTTPError 403: an injected fault: grant your account ") == 1
    )


@pytest.mark.slow
def test_the_same_program_goes_to_every_slice(cloud):
    first = cloud.git("rev-parse", "HEAD").strip()
    cloud.plan(0, "step=1 pause=1 preempt", "exit=0")
    cloud.plan(1, "wait", "exit=0")
    with cloud.started("babysit.sh", CONFIG) as process:
        until(lambda: cloud.starts, cloud)
        cloud.git("commit", "--allow-empty", "-qm", "b")
        assert process.wait(30) == 0
    assert os.readlink(cloud.home(0) / "dpo_jax" / "tree") == f"trees/{first}"
    assert cloud.verbs("create") == ["create", "create"]


def test_a_request_that_fails_is_made_again(cloud):
    cloud.next("create", "fail", "fail")
    for worker in (0, 1):
        cloud.plan(worker, "exit=0")
    code, seen, said = babysit(cloud)
    failed = ["refused", "gone", "deleting", "absent", "backing off", "requested"]
    assert (code, calm(seen)) == (0, ["absent", "requested", *failed, *failed, *START, "finished", "kept"])
    assert "queued-resources dpo: FAILED" in said


def test_a_refused_request_is_made_again_ever_later_and_then_given_up(cloud):
    cloud.next("create", *["refuse"] * 4)
    (cloud.root / "bin" / "sleep").write_text("#!/bin/sh\n")
    (cloud.root / "bin" / "sleep").chmod(0o755)
    code, seen, said = babysit(cloud, MAX_REQUESTS="4", BACKOFF_SECONDS="600", BACKOFF_CAP="1800")
    again = ["refused", "absent", "backing off", "requested"]
    assert (code, seen) == (1, ["absent", "requested", *again, *again, *again, "refused", "absent", "given up"])
    assert re.findall(r"the next in (\d+) s", said) == ["600", "1200", "1800"]
    assert "Quota limit" in said


def test_a_lost_connection_is_waited_out(cloud):
    with cloud.started("babysit.sh", CONFIG) as process:
        until(lambda: "-> running" in cloud.said(), cloud)
        pids = cloud.pids()
        cloud.next("ssh", "255", "255", "255")
        until(lambda: "-> lost" in cloud.said(), cloud)
        cloud.next("describe", "1", "1")
        until(lambda: "-> unknown" in cloud.said(), cloud)
        until(lambda: re.search("-> unknown(.|\n)*-> running", cloud.said()), cloud)
        assert cloud.pids() == pids
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 130
    assert cloud.verbs("delete") == []
    assert cloud.pids() == pids


@pytest.mark.slow
def test_a_slice_that_cannot_be_reached_for_long_is_recreated(cloud):
    cloud.call("create.sh")
    for worker in (0, 1):
        cloud.plan(worker, "exit=0")
    (cloud.root / "next" / "ssh").write_text("255\n" * 1000)
    with cloud.started("babysit.sh", CONFIG, LOST_SECONDS="2") as process:
        until(lambda: "delete" in cloud.verbs("delete"), cloud)
        cloud.next("ssh")
        assert process.wait(30) == 0
    assert states((cloud.root / "out").read_text())[:4] == ["lost", "deleting", "absent", "requested"]


@pytest.mark.parametrize("code", ["1", pytest.param("137", marks=pytest.mark.slow)])
def test_one_worker_that_fails_starts_all_again(cloud, code):
    cloud.plan(0, "step=3 wait", "step=5 exit=0")
    cloud.plan(1, f"pause=0.3 exit={code}", "exit=0")
    end, seen, _ = babysit(cloud)
    assert end == 0
    assert calm(seen) == [
        "absent", "requested", *START, "broken", "halting", "failed", "run", "finished", "kept"]  # fmt: skip
    assert cloud.starts.count("dpo/0") == cloud.starts.count("dpo/1") == 2
    assert cloud.verbs("create", "delete") == ["create"]


@pytest.mark.slow
def test_a_worker_that_restarts_is_set_up_again(cloud):
    with cloud.started("babysit.sh", CONFIG) as process:
        until(lambda: "-> running" in cloud.said(), cloud)
        for worker in (0, 1):
            cloud.plan(worker, "exit=0")
        pid = int((cloud.home(1) / "dpo_jax/launched/first/pid").read_text())
        os.killpg(os.getpgid(pid), signal.SIGKILL)  # with the shell that would have written the exit code
        assert process.wait(30) == 0
    seen = states((cloud.root / "out").read_text())
    assert calm(seen)[-8:] == ["broken", "halting", *START, "finished", "kept"]


@pytest.mark.slow
def test_a_worker_that_cannot_be_stopped_goes_with_its_slice(cloud):
    cloud.plan(0, "wait", "exit=0")
    cloud.plan(1, "step=1 pause=1 exit=1", "exit=0")
    with cloud.started("babysit.sh", CONFIG) as process:
        until(lambda: "-> running" in cloud.said(), cloud)
        script = (cloud.home(0) / "dpo_jax" / "tree").resolve() / "launch" / "worker-run.sh"
        script.write_text(script.read_text().replace("halt() {", "halt() {\n  return 1", 1))
        assert process.wait(30) == 0
    seen = states((cloud.root / "out").read_text())
    assert calm(seen)[-10:] == ["broken", "halting", "deleting", "absent", "requested", *START, "finished", "kept"][1:]


def test_asked_to_stop_and_saved_it_goes_on_at_once(cloud):
    for worker in (0, 1):
        cloud.plan(worker, "step=3 pause=0.3 exit=42", "step=5 exit=0")
    code, seen, _ = babysit(cloud)
    assert (code, calm(seen)) == (
        0, ["absent", "requested", *START, "saved", "run", "finished", "kept"])  # fmt: skip


def test_restarts_without_a_new_step_come_to_an_end(cloud):
    for worker in (0, 1):
        cloud.plan(worker, "step=3 save=3 exit=1", "step=4 exit=1", *["step=4 exit=1"] * 9)
    code, seen, said = babysit(cloud, MAX_RESTARTS="2")
    assert (code, seen[-1]) == (1, "given up")
    assert "3 starts without a new step after step 4" in said
    assert cloud.starts.count("dpo/0") == 4


def test_a_run_that_hangs_is_started_again(cloud):
    cloud.plan(0, "step=3 wait", "step=4 exit=0")
    cloud.plan(1, "deaf wait", "exit=0")
    code, seen, said = babysit(cloud, STALL_SECONDS="2")
    assert (code, calm(seen)[-5:]) == (0, ["halting", "failed", "run", "finished", "kept"])
    assert "halting: stalled: workers: running,running at step 3" in said


@pytest.mark.parametrize("code", ["2", "43"])
def test_what_a_restart_will_not_cure_stops_it_and_is_shown(cloud, code):
    for worker in (0, 1):
        cloud.plan(worker, f"step=3 pause=0.5 exit={code}")
    end, seen, said = babysit(cloud, DELETE_WHEN_DONE="1")
    assert (end, seen[-1]) == (int(code), "stopped")
    assert f"the trainer's exit code is {code}" in said
    assert f"exit code {code} is planned" in said  # the end of the log
    assert sorted(cloud.starts) == ["dpo/0", "dpo/1"]
    assert cloud.verbs("delete") == []  # there may be something to look at


def test_a_cause_that_only_one_worker_knows_stops_all(cloud):
    cloud.plan(0, "step=3 wait")
    cloud.plan(1, "pause=0.3 exit=43")
    end, seen, _ = babysit(cloud)
    assert (end, seen[-3:]) == (43, ["halting", "final", "stopped"])
    assert cloud.pids() == []


def test_a_config_that_the_trainer_refuses_at_once(cloud):
    code, seen, said = babysit(cloud, "--no_such_option", "1", WATCH_SECONDS="2")
    assert (code, seen[-2:]) == (2, ["final", "stopped"])
    assert "dpo-jax: error: no_such_option" in said


def test_a_run_that_was_started_with_other_words_is_left_alone(cloud):
    cloud.install()
    cloud.call("run.sh", CONFIG, "--loss.beta", "0.1", WATCH_SECONDS="1")
    pids = cloud.pids()
    code, seen, said = babysit(cloud)
    assert (code, seen) == (2, ["running", "run", "stopped"])
    assert "RUN_ID: first runs with other settings" in said
    assert cloud.pids() == pids


def test_two_babysitters_of_one_run_cannot_be(cloud):
    with cloud.started("babysit.sh", CONFIG):
        until(lambda: "-> running" in cloud.said(), cloud)
        second = cloud.call("babysit.sh", CONFIG)
        assert (second.returncode, second.stdout) == (2, "")
        assert re.fullmatch(r"launch: NAME: dpo cannot be used: another babysit.sh .+\n", second.stderr)
    cloud.clean()
    cloud.plan(0, "exit=0")
    cloud.plan(1, "exit=0")
    assert babysit(cloud)[0] == 0  # the lock went with the first


def test_several_slices_are_made_and_started_together(cloud):
    cloud.set(SLICES="2")
    cloud.plan(0, "step=1 pause=0.5 preempt")
    with cloud.started("babysit.sh", CONFIG, DELETE_WHEN_DONE="1") as process:
        until(lambda: cloud.verbs("create").count("create") == 2, cloud)
        until(lambda: len(cloud.starts) == 8, cloud)
        for worker in (0, 1):
            cloud.plan(worker, *["exit=0"] * 4)
        os.kill(cloud.pids()[0], signal.SIGKILL)  # one worker of one slice
        assert process.wait(30) == 0
    assert sorted(cloud.starts) == sorted(["dpo-0/0", "dpo-0/1", "dpo-1/0", "dpo-1/1"] * 3)
    assert cloud.verbs("create", "delete") == ["create", "delete", "create", "delete"]


@pytest.mark.slow
def test_a_direct_request(cloud):
    cloud.set(REQUEST="direct", CREATE_FLAGS="")
    cloud.next("create", "refuse")
    for worker in (0, 1):
        cloud.plan(worker, "exit=0")
    code, seen, _ = babysit(cloud, DELETE_WHEN_DONE="1")
    assert (code, calm(seen)) == (0, ["absent", "requested", "refused", "absent", "backing off", "requested", *START,
                                "finished", "deleting", "deleted"])  # fmt: skip
