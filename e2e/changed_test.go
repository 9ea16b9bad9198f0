package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"keybroker/e2e/domain"
	"keybroker/internal/daemon"
)

// permit puts a policy entry for the guest, with more lines in it, in force in place of the one that admitted made.
func permit(ctx context.Context, t *testing.T, g domain.Spec, more string) {
	t.Helper()
	admit(ctx, t, filepath.Base(g.Dir()), fmt.Sprintf("[[vm]]\nuuid = %q\nname = %q\ntier = \"vm\"\nkeys = [\"disk\"]\n%s", g.UUID, g.Name, more))
}

// TestChangedDomain: whatever an administrator makes of a domain, it opens the disk that it had, once for each boot, as long as
// the policy knows it.
func TestChangedDomain(outer *testing.T) {
	t := outer
	ctx := operated(t)
	g := admitted(ctx, t, "changed")
	spec := g.Spec // as it is after each step
	on := func(t *testing.T) *guest { return &guest{spec, t, ctx} }
	t.Cleanup(func() { on(t).remove() })
	volume, releases := "", 0
	opened := func(g *guest) {
		g.t.Helper()
		g.open()
		releases++
		if got := g.releases(); got != releases {
			g.t.Errorf("the audit has %d releases, expected %d", got, releases)
		}
		g.marked("changed-was-here")
		if got := g.run("cryptsetup luksUUID /dev/vdb"); got != volume {
			g.t.Errorf("the volume is %s, it was %s", got, volume)
		}
	}
	must := func(name string, f func(t *testing.T, g *guest)) {
		if !t.Run(name, func(t *testing.T) { f(t, on(t)) }) {
			t.FailNow() // the next step is made of this one
		}
	}

	must("undefined while it runs", func(t *testing.T, g *guest) {
		g.start()
		g.open()
		releases = 1
		g.plant("changed-was-here")
		volume = g.run("cryptsetup luksUUID /dev/vdb")
		g.virsh("undefine")
		g.run("killall keybroker-agent; cryptsetup close data")
		from := g.agentAgain("/none")
		g.expect(from, "ready:")
		opened(g)
		g.virsh("destroy") // and is gone
		g.until("gone", func(v daemon.VMStatus) bool { return v.State == daemon.VMOff })
	})
	must("transient", func(t *testing.T, g *guest) {
		g.reboots(func() { sh(ctx, t, "virsh -q create "+g.Dir()+"/domain.xml") })
		opened(g)
		sh(ctx, t, "virsh -q define "+g.Dir()+"/domain.xml") // while it runs
		g.virsh("destroy")
	})
	must("renamed", func(t *testing.T, g *guest) {
		g.virsh("domrename", "renamed")
		spec.Was, spec.Name = spec.Name, "renamed"
		g = on(t)
		if out, err := domain.Virsh(step(ctx, t), "start", g.Name); err == nil || !strings.Contains(out, "wrong-vm-name") {
			t.Errorf("starting it before the policy has its new name: %v, %s", err, out)
		}
		permit(ctx, outer, g.Spec, "")
		g.start()
		opened(g)
		g.virsh("destroy")
		g.virsh("undefine")
	})
	earlier := spec.UUID
	must("another UUID", func(t *testing.T, _ *guest) {
		spec.UUID = "c0ffee00-1111-4222-8333-444444444444"
		g := on(t)
		if err := g.Define(step(ctx, t)); err != nil {
			t.Fatal(err)
		}
		permit(ctx, outer, g.Spec, fmt.Sprintf("subject = %q\n", earlier))
		releases = 0
		from := g.ConsoleEnd()
		g.start()
		opened(g)
		g.inherited(earlier)
		g.saysTimes(from)
	})
	must("vsock unplugged", func(t *testing.T, g *guest) { g.losesVsock() })
	sh(ctx, t, "keybroker audit verify --identity "+pin(ctx, t))
}

// inherited holds that the audit and status name the subject whose keys the guest got.
func (g *guest) inherited(subject string) {
	g.t.Helper()
	if out := sh(g.ctx, g.t, "keybroker audit query --json --event release --subject "+g.UUID); !strings.Contains(out, "keys of subject "+subject) {
		g.t.Errorf("the record of the release does not name %s: %s", subject, out)
	}
	if v := g.shown(); v.Subject != subject {
		g.t.Errorf("status has the subject %q, expected %q", v.Subject, subject)
	}
}

// steps are the agent's on the way to its keys, in the order of its console.
var steps = []string{"listening", "connected", "challenge", "release", "in its sink", "acknowledged"}

// saysTimes holds that the agent's console says how long each step of a start took, and shows it.
func (g *guest) saysTimes(from int64) {
	g.t.Helper()
	line, _ := g.expect(from, "times after the start: ")
	before := 0.0
	for n, step := range regexp.MustCompile(`([a-z][a-z ]*) (\d+\.\d{3}) s`).FindAllStringSubmatch(line, -1) {
		at, err := strconv.ParseFloat(step[2], 64)
		if err != nil || n >= len(steps) || step[1] != steps[n] || at < before {
			g.t.Errorf("step %d is %q at %q, expected %v in this order", n+1, step[1], step[2], steps)
			return
		}
		g.t.Logf("%-12s %6.3f s after the agent's start, %6.3f s after the step before", step[1], at, at-before)
		before = at
	}
	if before == 0 {
		g.t.Errorf("the console says %q, expected the times of %v", line, steps)
	}
}

// losesVsock unplugs the running guest's vsock, with libvirt's name for it and with an administrator's: the ticket is gone at once,
// and status and audit say why.
func (g *guest) losesVsock() {
	g.t.Helper()
	cid, err := g.CID(g.ctx)
	if err != nil {
		g.t.Fatal(err)
	}
	gone := func(v daemon.VMStatus) bool {
		return v.Ticket == "none" && strings.Contains(v.Why, "vsock device was unplugged")
	}
	device := filepath.Join(g.Dir(), "vsock.xml")
	plug := func(command, alias string) {
		text := fmt.Sprintf("<vsock model='virtio'><cid auto='yes' address='%d'/>%s</vsock>", cid, alias)
		if err := os.WriteFile(device, []byte(text), 0o644); err != nil {
			g.t.Fatal(err)
		}
		g.virsh(command, device, "--live")
	}
	plug("detach-device", "")
	if v := g.until("without a ticket", gone); v.State != daemon.VMQuiet {
		g.t.Errorf("status says %q", v.State)
	}
	if out := sh(g.ctx, g.t, "keybroker audit query --json --event ticket --subject "+g.UUID); !strings.Contains(out, "vsock device unplugged: none") {
		g.t.Errorf("the audit does not say what took the ticket: %s", out)
	}

	plug("attach-device", "<alias name='ua-channel'/>")
	sh(g.ctx, g.t, "keybroker vm allow "+g.Name)
	g.until("allowed again", func(v daemon.VMStatus) bool { return v.Ticket == "unused" })
	g.virsh("detach-device-alias", "ua-channel", "--live")
	g.until("without a ticket again", gone)
}
