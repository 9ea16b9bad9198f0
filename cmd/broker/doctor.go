package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"keybroker/derive"
	"keybroker/internal/config"
	"keybroker/internal/daemon"
	"keybroker/seal"
	"keybroker/seal/tpm2"
)

// finding is one thing that doctor looked at.
type finding struct {
	what string
	ok   bool
	got  string // what it found
	mend string // the command or change that mends it
}

func newDoctorCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Check this host, and say how to mend what is wrong",
		Long:  "Check the TPM, the kernel, vhost-vsock, libvirt and its hook, swap, permissions and the broker. Exit status 1 when something is wrong. Nothing is changed.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, paths, err := g.load()
			if err != nil {
				return err
			}
			return g.report(examine(cmd.Context(), g, cfg, paths))
		},
	}
}

func (g *globals) report(findings []finding) error {
	t := tabwriter.NewWriter(g.stdout, 0, 0, 2, ' ', 0)
	wrong := 0
	for _, f := range findings {
		mark := "ok"
		if !f.ok {
			mark = "WRONG"
			wrong++
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", mark, f.what, f.got)
		if !f.ok && f.mend != "" {
			fmt.Fprintf(t, "\t\tmend: %s\n", g.here(f.mend))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if wrong > 0 {
		return fmt.Errorf("%d of %d checks found something wrong", wrong, len(findings))
	}
	return nil
}

func examine(ctx context.Context, g *globals, cfg *config.Config, paths config.Paths) []finding {
	found := []finding{
		checkTPM(cfg.TPM, paths.Realm),
		checkSecretMemory(),
		checkRealm(paths.Realm),
	}
	for _, w := range cfg.Warnings() {
		what, got, _ := strings.Cut(w, ": ")
		found = append(found, finding{what: what, got: got})
	}
	found = append(found, checkVMs(ctx, cfg.Libvirt, libvirtPrograms)...)
	return append(found, checkSwap("/proc/swaps"), checkClock(), checkBroker(ctx, g))
}

// checkTPM wants a TPM where one opens the realm, or where there is no realm yet.
func checkTPM(path, realm string) finding {
	f := finding{what: "TPM", got: path}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !needsTPM(realm):
		f.ok, f.got = true, path+" is missing, and no keyslot needs it"
	case errors.Is(err, fs.ErrNotExist):
		f.got, f.mend = path+" is missing", "enable the TPM in the firmware (`modprobe tpm_tis`), or use `--slot passphrase`"
	case err != nil:
		f.got = err.Error()
	case info.Mode()&(fs.ModeDevice|fs.ModeSocket) == 0:
		f.got, f.mend = path+" is neither a device nor a socket", "set tpm in broker.toml"
	default:
		f.ok = true
	}
	return f
}

// needsTPM is false only of a realm file that can be read and has no slot of a TPM.
func needsTPM(realm string) bool {
	file, err := seal.Load(realm)
	return err != nil || slices.ContainsFunc(file.Slots(), func(s seal.Slot) bool { return s.Kind == tpm2.Kind })
}

func checkSecretMemory() finding {
	f := finding{what: "secret memory"}
	page, err := derive.NewPage()
	if err != nil {
		f.got, f.mend = err.Error(), "raise RLIMIT_MEMLOCK (LimitMEMLOCK=64M in the unit)"
		return f
	}
	defer page.Close()
	if f.got, err = derive.PageKind(page); err != nil {
		f.got = err.Error()
	}
	f.ok = f.got == derive.PageSecret
	f.mend = "a kernel of 6.5 or newer, or secretmem.enable=1 on its command line"
	return f
}

func checkRealm(path string) finding {
	f := finding{what: "realm file", got: path}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f.got, f.mend = path+" is missing", "`keybroker init --slot tpm2`"
	case err != nil:
		f.got, f.mend = err.Error(), "run doctor as root"
	case info.Mode().Perm()&0o077 != 0:
		f.got, f.mend = fmt.Sprintf("%s has mode %04o", path, info.Mode().Perm()), "chmod 600 "+path
	case withoutSlots(path):
		f.got, f.mend = path+" has no keyslot: nothing opens it, once the broker stops", "restore realm.json from a copy, or `keybroker init --import FILE` with the same master"
	default:
		f.ok = true
	}
	return f
}

func withoutSlots(realm string) bool {
	file, err := seal.Load(realm)
	return err == nil && len(file.Slots()) == 0
}

// libvirtPrograms are the daemons that serve libvirt's sockets.
var libvirtPrograms = []string{"/usr/sbin/libvirtd", "/usr/sbin/virtqemud"}

// checkVMs looks at what virtual machines need, unless broker.toml says that there are none, or says nothing and nothing of
// libvirt is here.
func checkVMs(ctx context.Context, sockets, programs []string) []finding {
	switch {
	case len(sockets) == 0:
		return nil
	case slices.Equal(sockets, config.Default().Libvirt) && !slices.ContainsFunc(append(sockets[:len(sockets):len(sockets)], programs...), exists):
		return []finding{{what: "libvirt", ok: true, got: "no libvirt on this host"}}
	}
	return []finding{checkVhost("/dev/vhost-vsock"), checkLibvirt(sockets), checkHook(hookPath), checkHookSeen(ctx)}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// checkVhost refuses a device that more than root and one group may open: whoever can is any free CID.
func checkVhost(path string) finding {
	f := finding{what: "vhost-vsock"}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		f.got, f.mend = path+" is missing", "modprobe vhost_vsock; echo vhost_vsock >/etc/modules-load.d/vhost_vsock.conf"
		return f
	}
	f.got = fmt.Sprintf("%s has mode %04o", path, st.Mode&0o777)
	f.ok = st.Mode&0o007 == 0 && st.Uid == 0
	f.mend = "chgrp kvm " + path + "; chmod 660 " + path + " (and the udev rule that opened it)"
	return f
}

func checkLibvirt(sockets []string) finding {
	f := finding{what: "libvirt", mend: "systemctl enable --now libvirtd.socket, or set libvirt = [] in broker.toml on a host without VMs"}
	for _, s := range sockets {
		if info, err := os.Stat(s); err == nil && info.Mode()&fs.ModeSocket != 0 {
			f.ok, f.got = true, s
			return f
		}
	}
	f.got = "none of " + strings.Join(sockets, ", ") + " is there"
	return f
}

// hookPath is where libvirt looks for hooks of QEMU domains.
const hookPath = "/etc/libvirt/hooks/qemu.d/keybroker"

// hookSource is where `make install` put the hook: beside this program, whatever its PREFIX was.
func hookSource() string {
	if self, err := os.Executable(); err == nil {
		if path := filepath.Join(filepath.Dir(filepath.Dir(self)), "share/keybroker/libvirt-hook"); exists(path) {
			return path
		}
	}
	return "/usr/share/keybroker/libvirt-hook"
}

func checkHook(path string) finding {
	f := finding{what: "libvirt hook", got: path, mend: "install -D -m 755 " + hookSource() + " " + path + "; systemctl restart libvirtd"}
	var st unix.Stat_t
	switch err := unix.Stat(path, &st); {
	case err != nil:
		f.got = path + " is missing"
	case st.Mode&0o111 == 0:
		f.got = path + " is not executable"
	case st.Uid != 0 || st.Mode&0o022 != 0:
		f.got = path + " may be written by others than root"
	default:
		f.ok = true
	}
	return f
}

// checkHookSeen compares the hook's folder with libvirtd's age: hooks that were added later are not called until a restart.
func checkHookSeen(ctx context.Context) finding {
	f := finding{what: "hook seen by libvirt", mend: "systemctl restart libvirtd"}
	hook, err := os.Stat(hookPath)
	if err != nil {
		f.got = "there is no hook"
		return f
	}
	pid, name := libvirtProcess()
	if pid == "" {
		f.ok, f.got = true, "libvirt is not running now; it will see it when it starts"
		return f
	}
	process, err := os.Stat("/proc/" + pid)
	if err != nil {
		f.got = err.Error()
		return f
	}
	f.ok = !hook.ModTime().After(process.ModTime())
	f.got = name + " began before the hook was installed"
	if f.ok {
		f.got = name + " began after the hook was installed"
	}
	return f
}

func libvirtProcess() (pid, name string) {
	all, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return "", ""
	}
	for _, path := range all {
		comm, err := os.ReadFile(path)
		if n := strings.TrimSpace(string(comm)); err == nil && (n == "libvirtd" || n == "virtqemud") {
			return filepath.Base(filepath.Dir(path)), n
		}
	}
	return "", ""
}

// checkSwap wants every swap area encrypted or in memory: guests' memory, and so their keys, may be written to it.
func checkSwap(path string) finding {
	f := finding{what: "swap", ok: true, got: "none", mend: "swapoff -a, or put swap on dm-crypt with a random key (crypttab option swap)"}
	file, err := os.Open(path)
	if err != nil {
		return f
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Scan() // the heading
	for lines.Scan() {
		device := strings.Fields(lines.Text())[0]
		f.got = device
		if !swapIsCovered(device) {
			f.ok, f.got = false, device+" is not encrypted"
			return f
		}
	}
	return f
}

func swapIsCovered(device string) bool {
	if strings.Contains(device, "zram") {
		return true
	}
	real, err := filepath.EvalSymlinks(device)
	if err != nil {
		return false
	}
	uuid, err := os.ReadFile("/sys/class/block/" + filepath.Base(real) + "/dm/uuid")
	return err == nil && strings.HasPrefix(string(uuid), "CRYPT-")
}

// checkClock wants a clock that is set: the audit's times are worth no more than it.
func checkClock() finding {
	f := finding{what: "clock", mend: "systemctl enable --now systemd-timesyncd (or chrony)"}
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	switch {
	case err != nil:
		f.got = err.Error()
	case state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0:
		f.got = "not synchronised"
	default:
		f.ok, f.got = true, "synchronised"
	}
	return f
}

func checkBroker(ctx context.Context, g *globals) finding {
	f := finding{what: "broker", mend: "systemctl enable --now keybroker.socket keybroker.service"}
	var s daemon.Status
	if err := g.ask(ctx, http.MethodGet, "/v1/status", &s); err != nil {
		f.got = err.Error()
		if _, missing := exec.LookPath("systemctl"); missing != nil || g.stateDir != "" {
			f.mend = "`keybroker serve`"
		}
		return f
	}
	f.ok = s.Realm.State == "open" && len(s.Warnings) == 0
	f.got = "realm " + s.Realm.State
	if len(s.Warnings) > 0 {
		f.got, f.mend = strings.Join(s.Warnings, "; "), "as it says"
	} else if !f.ok {
		f.mend = "`keybroker status` says what it waits for; `keybroker unlock`"
	}
	return f
}
