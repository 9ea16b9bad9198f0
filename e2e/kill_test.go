package e2e

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"

	"keybroker/seal/tpm2/tpm2test"
)

// killAt makes the walks in the lab kill at every call instead of at some: `bin/lab test -test.run=TestKill -kill=all`, after
// make e2e has built them; -kill=41-80 are those calls alone.
var killAt = flag.String("kill", "sample", "kill at `WHICH` calls: sample, all or FROM-TO")

// chosen returns which of the calls 1 to total to kill at. A sample has so many (0: all), evenly spread, the first and the last
// among them.
func chosen(t *testing.T, total, sample int) (ns []int) {
	t.Helper()
	from, to, n := 1, total, total
	first, last, ranged := strings.Cut(*killAt, "-")
	switch {
	case *killAt == "all":
	case *killAt == "sample":
		n = min(cmp.Or(sample, total), total)
	case ranged:
		var err1, err2 error
		from, err1 = strconv.Atoi(first)
		to, err2 = strconv.Atoi(last)
		if err := errors.Join(err1, err2); err != nil || from < 1 || to < from {
			t.Fatalf("-kill=%s: expected FROM-TO, as 41-80: %v", *killAt, err)
		}
		n = to - from + 1
	default:
		t.Fatalf("-kill=%s: expected sample, all or FROM-TO", *killAt)
	}
	for i := range n {
		ns = append(ns, from+i*(to-from)/max(1, n-1))
	}
	return ns
}

// offline is what runs keybroker without a broker: in the lab the one that is there, with the lab's TPM; elsewhere one that is
// built for the test, with a software TPM. There it is quick enough to kill at every call.
type offline struct {
	ctx     context.Context
	program []string
	most    int // how many calls to kill at; 0: all
}

func newOffline(t *testing.T) *offline {
	t.Helper()
	if os.Getenv("KEYBROKER_LAB") != "" {
		return &offline{inLab(t), []string{"keybroker"}, 4}
	}
	tpm, dir := tpm2test.Start(t), t.TempDir()
	program, settings := filepath.Join(dir, "keybroker"), filepath.Join(dir, "broker.toml")
	if out, err := exec.Command("go", "build", "-o", program, "keybroker/cmd/broker").CombinedOutput(); err != nil {
		t.Fatalf("building keybroker: %v\n%s", err, out)
	}
	if err := os.WriteFile(settings, fmt.Appendf(nil, "tpm = %q\n", tpm.Path), 0o600); err != nil {
		t.Fatal(err)
	}
	return &offline{t.Context(), []string{program, "--config", settings}, 0}
}

// stateDir is a broker's state folder that no broker runs on.
type stateDir struct {
	*offline
	t   *testing.T
	dir string
}

// command is a command line of keybroker on this folder.
func (s stateDir) command(args ...string) []string {
	return slices.Concat(s.program, []string{"--state-dir", s.dir}, args)
}

// keybroker runs one, which must succeed.
func (s stateDir) keybroker(args ...string) string {
	s.t.Helper()
	line := s.command(args...)
	var stderr bytes.Buffer
	cmd := exec.CommandContext(step(s.ctx, s.t), line[0], line[1:]...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("keybroker %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func (s stateDir) hasRealm() bool {
	_, err := os.Lstat(filepath.Join(s.dir, "realm.json"))
	return err == nil
}

// slots are the ids of the realm's keyslots.
func (s stateDir) slots() (ids []string) {
	s.t.Helper()
	var list struct {
		Slots []struct {
			ID string `json:"id"`
		} `json:"slots"`
	}
	if err := json.Unmarshal([]byte(s.keybroker("slot", "list", "--json")), &list); err != nil {
		s.t.Fatal(err)
	}
	for _, slot := range list.Slots {
		ids = append(ids, slot.ID)
	}
	return ids
}

// works opens the realm and derives a key, which is recorded, and checks the audit. It returns the key.
func (s stateDir) works() string {
	s.t.Helper()
	key := s.keybroker("key", "derive", "walked", "--hex")
	s.keybroker("audit", "verify")
	if !strings.Contains(s.keybroker("audit", "query", "--json", "--event", "break-glass"), "walked") {
		s.t.Error("the audit verifies, without the record of what was derived")
	}
	return key
}

// A killedCommand is a command that is killed at each of its calls that change anything.
type killedCommand struct {
	*offline
	t    *testing.T
	from string   // the state folder before; "": none
	args []string // of keybroker
	// after checks what is left; done: the command ended by itself.
	after func(s stateDir, done bool)
}

// on makes a copy of the folder before.
func (k *killedCommand) on() stateDir {
	k.t.Helper()
	s := stateDir{k.offline, k.t, filepath.Join(k.t.TempDir(), "state")}
	if k.from != "" {
		if err := os.CopyFS(s.dir, os.DirFS(k.from)); err != nil {
			k.t.Fatal(err)
		}
	}
	return s
}

// killed runs the command until its nth call, 0: to its end.
func (k *killedCommand) killed(n int) *trace {
	k.t.Helper()
	s := k.on()
	tr := traced(k.ctx, k.t, n, s.command(k.args...)...)
	tr.wait()
	if tr.killed == 0 && (len(tr.exits) != 1 || slices.Max(slices.Collect(maps.Values(tr.exits))) != 0) {
		k.t.Fatalf("the command ended with %v: %s", tr.exits, tr.output.String())
	}
	k.after(s, tr.killed == 0)
	os.RemoveAll(s.dir)
	if k.t.Failed() {
		k.t.Fatalf("after a kill at call %d: %v", n, tr.points[max(0, len(tr.points)-1):])
	}
	return tr
}

// walk counts the calls, and kills at the chosen ones.
func (k *killedCommand) walk() {
	k.t.Helper()
	total := len(k.killed(0).points)
	ns, missed := chosen(k.t, total, k.most), 0
	var at []string
	for _, n := range ns {
		tr := k.killed(n)
		if tr.killed == 0 {
			missed++
			at = append(at, fmt.Sprintf("missed %d", n))
			continue
		}
		at = append(at, fmt.Sprintf("%d %s", n, tr.points[n-1].call))
	}
	logWalk(k.t, strings.Join(k.args[:2], " "), total, missed, at)
}

// logWalk says where a walk killed. Some kills never happen, where a run makes fewer calls than the one that was counted.
func logWalk(t *testing.T, what string, total, missed int, at []string) {
	t.Helper()
	t.Logf("%s makes %d counted calls; killed at %d of them (-kill=all: at each), %d ended before: %s", what, total, len(at)-missed, missed, strings.Join(at, ", "))
	if missed > 1+len(at)/10 {
		t.Errorf("%d of %d kills never happened", missed, len(at))
	}
}

// TestKillInit: an init that is killed at any moment leaves no realm, and can be repeated, or a whole one.
func TestKillInit(t *testing.T) {
	off := newOffline(t)
	master := sha256.Sum256([]byte("the master of the walk"))
	file := filepath.Join(t.TempDir(), "master")
	if err := os.WriteFile(file, master[:], 0o600); err != nil {
		t.Fatal(err)
	}
	k := &killedCommand{offline: off, t: t, args: []string{"init", "--slot", "tpm2", "--import", file}}
	var want string
	repeated := 0
	k.after = func(s stateDir, done bool) {
		if !s.hasRealm() {
			if done {
				t.Error("init ended well, and there is no realm")
			}
			repeated++
			s.keybroker(k.args...)
		}
		if got := s.works(); want == "" {
			want = got
		} else if got != want {
			t.Error("the realm gives another key than one that was made in peace")
		}
	}
	k.walk()
	t.Logf("%d times there was no realm, and init was repeated", repeated)
}

// TestKillSlotChange: a change of slots that is killed at any moment leaves the old or the new slots, and each opens the realm.
func TestKillSlotChange(t *testing.T) {
	off := newOffline(t)
	before := stateDir{off, t, filepath.Join(t.TempDir(), "before")}
	before.keybroker("init", "--slot", "tpm2")
	before.keybroker("slot", "add", "tpm2", "--pcrs", "sha256:7+11")
	slots, want := before.slots(), before.works()

	for name, c := range map[string]struct {
		args []string
		next int // how many slots there are then
	}{
		"add":    {[]string{"slot", "add", "tpm2", "--pcrs", "sha256:7+12"}, 3},
		"remove": {[]string{"slot", "remove", slots[1]}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			k := &killedCommand{offline: off, t: t, from: before.dir, args: c.args}
			made := 0
			k.after = func(s stateDir, done bool) {
				got := s.slots()
				switch {
				case len(got) == c.next && got[0] == slots[0]:
					made++
				case done || !slices.Equal(got, slots):
					t.Errorf("the slots are %v, they were %v", got, slots)
				}
				s.keybroker("slot", "test", "--all")
				if s.works() != want {
					t.Error("the realm gives another key than before")
				}
			}
			k.walk()
			t.Logf("%d times the change was made already", made)
		})
	}
}
