package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"keybroker/e2e/domain"
	"keybroker/internal/daemon"
)

// quietAfter is how long the broker makes no call when it has nothing more to do for a guest.
const quietAfter = time.Second

// underTracer does what makes the broker work, and kills it or its keyholder at the nth call of the two; 0: not. It returns when
// done reports so and both are quiet, or when one is dead and systemd's next broker runs.
func underTracer(ctx context.Context, t *testing.T, n int, do func(), done func() bool) *trace {
	t.Helper()
	sh(ctx, t, "systemctl reset-failed keybroker.service") // or systemd would not start one that ends so often
	brokerOpen(ctx, t)
	before := status(ctx, t)
	tr := traced(ctx, t, n, "-p", strconv.Itoa(before.PID), strconv.Itoa(before.Realm.HolderPID))
	do()
	limit, ended := step(ctx, t), false
	for !ended && !done() && limit.Err() == nil {
		ended = tr.settle(100 * time.Millisecond)
	}
	if !ended && !tr.settle(quietAfter) {
		tr.stop()
	}
	tr.wait()
	brokerOpen(ctx, t)
	if after := status(ctx, t); (tr.killed != 0) != (after.PID != before.PID) {
		t.Errorf("process %d was killed, and the broker was %d and is %d", tr.killed, before.PID, after.PID)
	}
	return tr
}

// startKilled is `virsh start` of the guest, with a kill at the nth call during it.
func (g *guest) startKilled(n int) *trace {
	g.t.Helper()
	return underTracer(g.ctx, g.t, n, func() {
		if _, err := domain.Virsh(step(g.ctx, g.t), "start", g.Name); err != nil {
			g.t.Fatal(err)
		}
	}, func() bool { return true })
}

// A killRound is a start of two guests, which boot side by side, with kills at the nth call: while the first is started, while the
// second is, and, one after the other, while they get their keys.
type killRound struct {
	start   [2]int
	release []int
}

// rounds spreads kills at each of so many calls over rounds: two starts in each, and three calls of the releases, which are few
// enough together that the two guests make them all. The last one comes first: there is less to do after each.
func rounds(start, release int) (all []killRound) {
	n := max((start+1)/2, (release+2)/3)
	for r := range n {
		all = append(all, killRound{
			start:   [2]int{min(2*r+1, start), min(2*r+2, start)},
			release: []int{max(release-r, 1), min(n+r+1, release), r + 1},
		})
	}
	return all
}

// TestKillStart: a broker that is killed at any moment of a VM's start, and again while guests get their keys, is started anew by
// systemd; the VMs open their disks, by nobody's help and with the same key, and the audit verifies.
func TestKillStart(t *testing.T) {
	ctx := operated(t)
	guests := []*guest{admitted(ctx, t, "killed1"), admitted(ctx, t, "killed2")}
	for _, g := range guests {
		g.start()
		g.open()
		g.plant(g.Name)
		g.virsh("destroy")
	}
	play := func(k killRound) (starts, releases []*trace) {
		t.Helper()
		from := make([]int64, len(guests))
		ready := func() bool {
			for i, g := range guests {
				if !strings.Contains(consoleFrom(t, g, from[i]), "ready:") {
					return false
				}
			}
			return true
		}
		for i, g := range guests {
			from[i] = g.ConsoleEnd()
			starts = append(starts, g.startKilled(k.start[i]))
		}
		for _, n := range k.release {
			releases = append(releases, underTracer(ctx, t, n, func() {}, ready))
		}
		for i, g := range guests {
			g.expect(from[i], "ready:")
			// A broker that was killed after the acknowledgement has presumed a ticket: the guest may have booted meanwhile.
			g.until("shown with its keys", func(v daemon.VMStatus) bool {
				return v.State == daemon.VMReleased || v.State == daemon.VMAsking && v.Presumed
			})
			g.marked(g.Name)
			g.virsh("destroy")
		}
		sh(ctx, t, "keybroker audit verify --identity "+pin(ctx, t))
		return starts, releases
	}
	s, r := play(killRound{release: []int{0}})
	start, release := max(len(s[0].points), len(s[1].points)), (len(r[0].points)+1)/2
	t.Logf("%d calls while a VM is started: %v", start, s[0].points)
	t.Logf("%d calls, for each of two, while they get their keys: %v", release, r[0].points)

	missed := 0
	var at []string
	all := rounds(start, release)
	for _, n := range chosen(len(all), 3) {
		began, k := time.Now(), all[n-1]
		var here []string
		note := func(what string, n int, tr *trace) {
			if tr.killed == 0 {
				missed++
				what = "missed " + what
			}
			here = append(here, fmt.Sprintf("%s %d %s", what, n, tr.points[max(0, len(tr.points)-1):]))
		}
		starts, releases := play(k)
		for i, tr := range starts {
			note("start", k.start[i], tr)
		}
		for i, tr := range releases {
			note("release", k.release[i], tr)
		}
		t.Logf("round %d of %d, %.0f s: %s", n, len(all), time.Since(began).Seconds(), strings.Join(here, ", "))
		at = append(at, here...)
		if t.Failed() {
			t.FailNow()
		}
	}
	logWalk(t, "a VM's start and release", start+release, missed, at)
}
