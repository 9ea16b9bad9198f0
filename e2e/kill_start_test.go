package e2e

import (
	"fmt"
	"strconv"
	"testing"
	"time"

	"keybroker/e2e/domain"
	"keybroker/internal/daemon"
)

// quietAfter is how long the broker makes no call when it has nothing more to do for a guest.
const quietAfter = time.Second

// startKilled starts the guest from cold, and kills the broker or its keyholder at the nth call of the two; 0: not. The guest has to
// come up with its disk open by itself, and the broker too.
func (g *guest) startKilled(n int) *trace {
	g.t.Helper()
	sh(g.ctx, g.t, "systemctl reset-failed keybroker.service") // or systemd would not start one that ends so often
	brokerOpen(g.ctx, g.t)
	before := status(g.ctx, g.t)
	tr := traced(g.ctx, g.t, n, "-p", strconv.Itoa(before.PID), strconv.Itoa(before.Realm.HolderPID))
	from := g.ConsoleEnd()
	if _, err := domain.Virsh(step(g.ctx, g.t), "start", g.Name); err != nil {
		g.t.Fatal(err)
	}
	g.expect(from, "ready:")
	if !tr.settle(quietAfter) {
		tr.cmd.Process.Kill() // which lets go what it traced
	}
	tr.wait()
	brokerOpen(g.ctx, g.t)
	if after := status(g.ctx, g.t); (tr.killed != 0) != (after.PID != before.PID) {
		g.t.Errorf("process %d was killed, and the broker was %d and is %d", tr.killed, before.PID, after.PID)
	}
	// A broker that was killed after the acknowledgement has presumed a ticket: the guest may have booted meanwhile.
	g.until("shown with its key", func(v daemon.VMStatus) bool {
		return v.State == daemon.VMReleased || tr.killed != 0 && v.State == daemon.VMAsking && v.Presumed
	})
	return tr
}

// TestKillStart: a broker that is killed at any moment of a VM's start is started anew by systemd; the VM opens its disk, by nobody's
// help and with the same key, and the audit verifies.
func TestKillStart(t *testing.T) {
	ctx := operated(t)
	g := admitted(ctx, t, "killed")
	first := len(g.startKilled(0).points)
	g.plant("not-killed")
	g.virsh("destroy")
	points := g.startKilled(0).points
	g.marked("not-killed")
	g.virsh("destroy")
	t.Logf("a start: %d calls, the first one, which formats, %d: %v", len(points), first, points)

	missed := 0
	var at []string
	for _, n := range chosen(t, len(points), 3) {
		began := time.Now()
		tr := g.startKilled(n)
		g.marked("not-killed")
		g.virsh("destroy")
		sh(ctx, t, "keybroker audit verify --identity "+pin(ctx, t))
		if t.Failed() {
			t.Fatalf("after a kill at call %d: %v", n, tr.points)
		}
		if tr.killed == 0 {
			missed++
			at = append(at, fmt.Sprintf("missed %d", n))
			continue
		}
		last := tr.points[len(tr.points)-1]
		t.Logf("killed at %d, %s of process %d; opened and checked in %.0f s", n, last.call, last.pid, time.Since(began).Seconds())
		at = append(at, fmt.Sprintf("%d %s", n, last.call))
	}
	logWalk(t, "a VM's start", len(points), missed, at)
}
