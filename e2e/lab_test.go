// Package e2e is the end-to-end tests: keybroker as a user has it, with real libvirt, KVM guests, vhost-vsock, a TPM and
// systemd, inside the host VM that Command lab boots.
package e2e

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"keybroker/e2e/domain"
)

// guestLimit is how long a step of a guest may take. Emulated, on a busy machine, a boot takes up to 20 s.
const guestLimit = 90 * time.Second

// inLab skips a test outside the lab's host VM, and only there. Its context ends some time before the test's own deadline.
func inLab(t *testing.T) context.Context {
	t.Helper()
	if os.Getenv("KEYBROKER_LAB") == "" {
		t.Skip("runs in the lab's host VM: make test, or make e2e for these alone")
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	t.Cleanup(func() {
		if t.Failed() {
			logJournal(t)
		}
	})
	return ctx
}

// logJournal shows what systemd's journal has of keybroker and libvirt, last lines only.
func logJournal(t *testing.T) {
	t.Helper()
	out, err := exec.Command("journalctl", "-b", "--no-pager", "-o", "short-monotonic", "-n", "40",
		"-u", "keybroker.service", "-u", "libvirtd.service").CombinedOutput()
	t.Logf("journal (%v):\n%s", err, out)
}

// step is ctx with the time limit of one step.
func step(ctx context.Context, t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, guestLimit)
	t.Cleanup(cancel)
	return ctx
}

// guest is a lab guest in a test: each method fails the test where the step fails.
type guest struct {
	domain.Spec
	t   *testing.T
	ctx context.Context
}

// define defines a guest with blank disks and removes it when the test ends.
func define(ctx context.Context, t *testing.T, spec domain.Spec) *guest {
	t.Helper()
	g := &guest{spec, t, ctx}
	g.remove()
	if err := spec.Define(step(ctx, t)); err != nil {
		t.Fatalf("defining %s: %v", spec.Name, err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			g.logConsole()
		}
		g.remove()
	})
	return g
}

// remove destroys and undefines the guest, if it is there, and removes its disks.
func (g *guest) remove() {
	g.t.Helper()
	for _, args := range [][]string{{"destroy", g.Name}, {"undefine", "--managed-save", g.Name}} {
		out, err := domain.Virsh(context.WithoutCancel(g.ctx), args...)
		if err != nil && !strings.Contains(out, "not running") && !strings.Contains(out, "failed to get domain") {
			g.t.Errorf("removing %s: %v", g.Name, err)
		}
	}
	if err := os.RemoveAll(g.Dir()); err != nil {
		g.t.Errorf("removing the files of %s: %v", g.Name, err)
	}
}

// logConsole shows the console's last lines.
func (g *guest) logConsole() {
	g.t.Helper()
	content, err := os.ReadFile(g.Console())
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	g.t.Logf("console of %s (%v):\n%s", g.Name, err, strings.Join(lines[max(0, len(lines)-20):], "\n"))
}

// virsh runs a virsh command on the guest, whose name follows it.
func (g *guest) virsh(command string, args ...string) string {
	g.t.Helper()
	out, err := domain.Virsh(step(g.ctx, g.t), append([]string{command, g.Name}, args...)...)
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}

// start starts the guest and waits until it has booted.
func (g *guest) start() {
	g.t.Helper()
	if err := g.Start(step(g.ctx, g.t)); err != nil {
		g.t.Fatal(err)
	}
}

// expect waits for a line on the console after the offset from, and returns it and the offset after it.
func (g *guest) expect(from int64, text string) (string, int64) {
	g.t.Helper()
	line, next, err := g.Wait(step(g.ctx, g.t), from, text)
	if err != nil {
		g.t.Fatal(err)
	}
	return line, next
}

// reboots does what should reboot the guest, and waits until it has booted again.
func (g *guest) reboots(do func()) {
	g.t.Helper()
	from := g.ConsoleEnd()
	do()
	if err := g.WaitUp(step(g.ctx, g.t), from); err != nil {
		g.t.Fatal(err)
	}
}

// run runs a command as root in the guest, which must succeed, and returns its output.
func (g *guest) run(command string) string {
	g.t.Helper()
	return g.runAs("root", command)
}

// runAs runs a command as one of the guest's users, which must succeed, and returns its output.
func (g *guest) runAs(user, command string) string {
	g.t.Helper()
	result, err := g.Run(step(g.ctx, g.t), user, command)
	if err != nil {
		g.t.Fatal(err)
	}
	if result.Status != 0 {
		g.t.Fatalf("%q in %s ended with status %d: %s", command, g.Name, result.Status, result.Output)
	}
	return strings.TrimSpace(result.Output)
}

// sh runs a shell command on the host as root, which must succeed, and returns its output.
func sh(ctx context.Context, t *testing.T, command string) string {
	t.Helper()
	out, err := exec.CommandContext(step(ctx, t), "bash", "-c", command).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return strings.TrimSpace(string(out))
}
