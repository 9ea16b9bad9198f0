package e2e

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"keybroker/e2e/domain"
	"keybroker/internal/daemon"
)

// broughtUp brings the host up with the first test that wants it: each test is a process of its own.
func broughtUp() (string, error) {
	const done = "/run/lab.up"
	if _, err := os.Stat(done); err == nil {
		return "", nil
	}
	out, err := exec.Command("/share/e2e/up.sh").CombinedOutput()
	if err == nil {
		err = os.WriteFile(done, nil, 0o644)
	}
	return string(out), err
}

// operated has everything up as an operator leaves it: the broker runs on a realm in the TPM, web1 and web2 have a policy.
func operated(t *testing.T) context.Context {
	t.Helper()
	ctx := inLab(t)
	if out, err := broughtUp(); err != nil {
		t.Fatalf("bringing keybroker up: %v\n%s", err, out)
	}
	return ctx
}

// pin is what agents of this host trust.
func pin(ctx context.Context, t *testing.T) string {
	t.Helper()
	return sh(ctx, t, "keybroker identity")
}

// standard defines one of the lab's own guests anew, with blank disks.
func standard(ctx context.Context, t *testing.T, name string) *guest {
	t.Helper()
	spec, err := domain.Find(name)
	if err != nil {
		t.Fatal(err)
	}
	spec.Agent = domain.AgentConfig(pin(ctx, t), "disk")
	return define(ctx, t, spec)
}

// admitted defines a guest of this name with blank disks and a UUID of its own, which a drop-in of the policy lets have its disk.
func admitted(ctx context.Context, t *testing.T, name string) *guest {
	t.Helper()
	h := fmt.Sprintf("%x", sha256.Sum256([]byte(name)))
	uuid := fmt.Sprintf("%s-%s-4%s-8%s-%s", h[:8], h[8:12], h[12:15], h[15:18], h[18:30])
	entry := fmt.Sprintf("[[vm]]\nuuid = %q\nname = %q\ntier = \"vm\"\nkeys = [\"disk\"]\n", uuid, name)
	admit(ctx, t, name, entry)
	return define(ctx, t, domain.Spec{Name: name, UUID: uuid, Keys: []string{"disk"}, Agent: domain.AgentConfig(pin(ctx, t), "disk")})
}

// admit puts a drop-in of the policy in force, until the test ends.
func admit(ctx context.Context, t *testing.T, name, text string) {
	t.Helper()
	path := "/etc/keybroker/policy.d/" + name + ".toml"
	t.Cleanup(func() { os.Remove(path) })
	if err := errors.Join(os.MkdirAll("/etc/keybroker/policy.d", 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
	sh(ctx, t, "systemctl reload keybroker.service")
}

// shown is what status says of the guest.
func (g *guest) shown() (v daemon.VMStatus) {
	g.t.Helper()
	out, err := exec.CommandContext(step(g.ctx, g.t), "keybroker", "vm", "show", g.Name).Output()
	if err == nil {
		err = json.Unmarshal(out, &v)
	}
	if err != nil {
		g.t.Logf("vm show %s: %v %s", g.Name, err, out)
	}
	return v
}

// runs says whether status has the guest as one that runs.
func runs(v daemon.VMStatus) bool { return v.State != "" && v.State != daemon.VMOff }

// until waits until status says of the guest what ok wants.
func (g *guest) until(what string, ok func(daemon.VMStatus) bool) daemon.VMStatus {
	g.t.Helper()
	ctx := step(g.ctx, g.t)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		v := g.shown()
		if ok(v) {
			return v
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			g.t.Fatalf("%s never was %s; status says %+v", g.Name, what, v)
		}
	}
}

// open waits until the guest has acknowledged that its disk is open.
func (g *guest) open() {
	g.t.Helper()
	g.until("released with its disk open", func(v daemon.VMStatus) bool {
		return v.State == daemon.VMReleased && strings.HasPrefix(v.Ticket, "used, ack") && strings.Contains(fmt.Sprint(v.Sinks), "open")
	})
}

// releases counts the audit's releases of the guest.
func (g *guest) releases() int {
	g.t.Helper()
	out := sh(g.ctx, g.t, "keybroker audit query --json --event release --subject "+g.UUID)
	return len(strings.Fields(strings.ReplaceAll(out, " ", "")))
}

// plant writes a mark into the open volume, and marked says whether it is there.
func (g *guest) plant(mark string) {
	g.t.Helper()
	g.run("printf " + mark + " | dd of=/dev/mapper/data bs=512 conv=sync,fsync 2>/dev/null")
}

func (g *guest) marked(mark string) {
	g.t.Helper()
	if got := g.run(fmt.Sprintf("head -c %d /dev/mapper/data", len(mark))); got != mark {
		g.t.Errorf("the volume of %s begins with %q, expected %q: it was not opened with the same key", g.Name, got, mark)
	}
}

// TestVM is the main job: a guest opens its disk with a key that was pushed to it, the same at each boot, once for each boot.
func TestVM(t *testing.T) {
	ctx := operated(t)
	web1 := standard(ctx, t, "web1")
	on := func(t *testing.T) *guest { return &guest{web1.Spec, t, ctx} }

	releases := 0
	booted := func(t *testing.T, what string) {
		t.Helper()
		g := on(t)
		g.open()
		releases++
		if got := g.releases(); got != releases {
			t.Errorf("after %s the audit has %d releases, expected %d", what, got, releases)
		}
	}

	t.Run("first boot formats and opens", func(t *testing.T) {
		g := on(t)
		from := g.ConsoleEnd()
		g.start()
		g.expect(from, "/dev/vdb was blank and has been formatted")
		booted(t, "the first boot")
		g.plant("web1-was-here")
	})
	t.Run("reboot from inside", func(t *testing.T) {
		g := on(t)
		g.reboots(func() { g.run("(reboot -f) >/dev/null 2>&1 &") })
		booted(t, "a reboot from inside")
		g.marked("web1-was-here")
	})
	t.Run("virsh reboot", func(t *testing.T) {
		g := on(t)
		g.reboots(func() { g.virsh("reboot") })
		booted(t, "virsh reboot")
		g.marked("web1-was-here")
	})
	t.Run("virsh reset", func(t *testing.T) {
		g := on(t)
		g.reboots(func() { g.virsh("reset") })
		booted(t, "virsh reset")
		g.marked("web1-was-here")
	})
	t.Run("save and restore release nothing", func(t *testing.T) {
		g := on(t)
		image := g.Dir() + "/saved"
		g.virsh("save", image)
		sh(ctx, t, "virsh -q restore "+image)
		g.marked("web1-was-here") // the guest answers, with the volume that it had open
		if got := g.releases(); got != releases {
			t.Errorf("the audit has %d releases after a restore, expected %d", got, releases)
		}
		if v := g.until("seen", func(v daemon.VMStatus) bool { return runs(v) }); strings.HasPrefix(v.Ticket, "unused") {
			t.Errorf("a restored guest has the ticket %q", v.Ticket)
		}
	})
	t.Run("stop and start", func(t *testing.T) {
		g := on(t)
		g.virsh("destroy")
		g.start()
		booted(t, "a cold start")
		g.marked("web1-was-here")
	})
	t.Run("two at once, and a CID that was another's", func(t *testing.T) {
		web2 := standard(ctx, t, "web2")
		before, err := web1.CID(ctx)
		if err != nil {
			t.Fatal(err)
		}
		g := on(t)
		g.virsh("destroy")
		web2.start() // takes the CID that web1 had
		if cid, err := web2.CID(ctx); err != nil || cid != before {
			t.Errorf("web2 has CID %d (%v), expected web1's %d", cid, err, before)
		}
		web2.open()
		g.start()
		booted(t, "a start beside another")
		g.marked("web1-was-here")
		if got := web2.releases(); got != 1 {
			t.Errorf("web2 has %d releases, expected 1", got)
		}
	})
	t.Run("the audit verifies", func(t *testing.T) {
		sh(ctx, t, "keybroker audit verify --identity "+pin(ctx, t))
	})
}

// TestVMWithoutPolicy: the guest learns why, and so does the administrator.
func TestVMWithoutPolicy(t *testing.T) {
	ctx := operated(t)
	g := standard(ctx, t, "web3")
	from := g.ConsoleEnd()
	g.start()
	line, _ := g.expect(from, "refused: no-policy")
	if !strings.Contains(line, g.UUID) {
		t.Errorf("the console says %q, expected what to add to policy.toml", line)
	}
	v := g.until("refused", func(v daemon.VMStatus) bool { return v.State == daemon.VMRefused })
	if v.Code != "no-policy" || !strings.Contains(v.Why, g.UUID) {
		t.Errorf("status says %q, %q", v.Code, v.Why)
	}
	if out := sh(ctx, t, "keybroker audit query --json --code no-policy --subject "+g.UUID); out == "" {
		t.Error("the audit has no record of the refusal")
	}
	if g.releases() != 0 {
		t.Error("the audit has a release")
	}
}
