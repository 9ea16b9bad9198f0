package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// hostVM is one run of the host VM.
type hostVM struct {
	tree, dir, mode string
	number          string // of several host VMs of one run; "" when there is one
	limit           time.Duration
	phases          int
	uid, gid        int // who owns the run's folder
	keyboard        io.Reader
	progress        io.Writer // where phases are shown
	stderr          io.Writer
}

func newHostVM(args []string, keyboard io.Reader) (*hostVM, error) {
	vm := &hostVM{tree: args[0], dir: args[1], mode: args[2], keyboard: keyboard, progress: os.Stderr, stderr: os.Stderr}
	var err error
	if vm.limit, err = time.ParseDuration(args[3]); err != nil {
		return nil, err
	}
	if vm.phases, err = strconv.Atoi(args[4]); err != nil {
		return nil, err
	}
	if _, err = fmt.Sscanf(args[5], "%d:%d", &vm.uid, &vm.gid); err != nil {
		return nil, fmt.Errorf("reading the owner: %w", err)
	}
	switch vm.mode {
	case "demo", "test":
		vm.progress = os.Stdout
	case "shell":
		vm.stderr = rawTerminal{os.Stderr} // the other half has made it so
		vm.progress = vm.stderr
	}
	return vm, nil
}

// rawTerminal writes to a terminal that does not turn a line's end into carriage return and line feed.
type rawTerminal struct{ io.Writer }

func (t rawTerminal) Write(p []byte) (int, error) {
	if _, err := io.WriteString(t.Writer, strings.ReplaceAll(string(p), "\n", "\r\n")); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (vm *hostVM) kernel() string { return filepath.Join(vm.tree, "tree/boot/vmlinuz") }

// out is a file that the host VM writes, and tpm the folder of its TPM; both relative to the run's folder, in which QEMU runs.
func (vm *hostVM) out(name string) string { return filepath.Join("out", vm.number, name) }
func (vm *hostVM) tpm() string            { return "tpm" + vm.number }

// path is where a file is that is relative to the run's folder.
func (vm *hostVM) path(name string) string { return filepath.Join(vm.dir, name) }

// run boots the host VM and returns the status of the command in it.
func (vm *hostVM) run(ctx context.Context) (int, error) {
	defer vm.giveAway()
	ctx, cancel := context.WithTimeout(ctx, vm.limit)
	defer cancel()
	kvm := vm.kvmWorks(ctx)
	if vm.mode == "test" {
		return vm.runTests(ctx, kvm)
	}
	up, err := vm.boot(ctx, kvm, vm.show)
	for n := 1; err == nil && !kvm && n < boots && ctx.Err() == nil && vm.mayRepeat(up); n++ {
		vm.sayRepeat()
		up, err = vm.boot(ctx, kvm, vm.show)
	}
	if err != nil {
		return exitFailed, err
	}
	status, err := vm.status()
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fmt.Errorf("the host VM was still running after %v", vm.limit)
	}
	if err == nil {
		err = vm.keepCapabilities()
	}
	if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
		vm.explain(status, up)
	}
	return status, err
}

// boots is how many emulated host VMs one job may use up. QEMU's emulation of a host with KVM guests is not sound: now and then
// the host panics or resets.
const boots = 5

// mayRepeat says whether the host VM ended before the command did, and another one may do the job. A command of the user's that was
// started is never repeated.
func (vm *hostVM) mayRepeat(up bool) bool {
	_, err := os.Stat(vm.path(vm.out(".status")))
	return err != nil && (!up || vm.mode == "demo")
}

// sayRepeat says that another host VM is needed, and keeps the console of the one that ended.
func (vm *hostVM) sayRepeat() {
	fmt.Fprintf(vm.progress, "%17sthe emulated host VM ended by itself, as it does now and then; another does the rest\n", "")
	console := vm.path(vm.out("console.log"))
	os.Rename(console, strings.TrimSuffix(console, ".log")+time.Now().Format("-150405.log"))
}

// status is what the command ended with.
func (vm *hostVM) status() (int, error) {
	name := vm.path(vm.out(".status"))
	content, err := os.ReadFile(name)
	if err != nil {
		return exitNoStatus, errors.New("the host VM ended before the command did")
	}
	os.Remove(name)
	return strconv.Atoi(strings.TrimSpace(string(content)))
}

// explain shows, after a failure, where to look and the console's last lines: the host VM's when it is its fault, else the
// guest's that wrote last.
func (vm *hostVM) explain(status int, up bool) {
	if status == 0 || (vm.mode != "demo" && status != exitNoStatus) {
		return
	}
	vm.showConsole(vm.progress, up && status != exitNoStatus)
}

// showConsole shows the last lines of the console, the host VM's or the guest's that wrote last, and where the others are.
func (vm *hostVM) showConsole(w io.Writer, guests bool) {
	console := vm.path(vm.out("console.log"))
	if guest := newest(vm.path(vm.out("*.console"))); guests && guest != "" {
		console = guest
	}
	fmt.Fprintf(w, "lab: the last lines of %s:\n", console)
	printTail(w, console, 20)
	fmt.Fprintf(w, "lab: consoles and logs are in %s\n", vm.path(vm.out("")))
}

// newest is the file that was written last among those that match.
func newest(pattern string) string {
	found, err := filepath.Glob(pattern)
	if err != nil {
		return ""
	}
	var name string
	var last time.Time
	for _, path := range found {
		if info, err := os.Stat(path); err == nil && info.ModTime().After(last) {
			name, last = path, info.ModTime()
		}
	}
	return name
}

// giveAway makes what the host VM wrote the user's.
func (vm *hostVM) giveAway() {
	filepath.WalkDir(vm.path("out"), func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			os.Lchown(path, vm.uid, vm.gid)
		}
		return nil
	})
}

// boot runs the host VM to its end, lets talk have the port on which the command in it reads and prints, and says whether the command
// was started.
func (vm *hostVM) boot(ctx context.Context, kvm bool, talk func(to io.Writer, from *bufio.Reader) error) (up bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tpm, err := vm.startTPM(ctx)
	if err != nil {
		return false, err
	}
	defer tpm.Wait()
	defer cancel() // swtpm ends with QEMU, and here where QEMU never came up
	defer os.RemoveAll(vm.path(vm.tpm()))

	start := time.Now()
	qemu := vm.qemu(ctx, vm.arguments(kvm)...)
	qemu.Stderr = os.Stderr
	keyboard, err := qemu.StdinPipe() // open as long as QEMU runs: its end would hang up on the command
	if err != nil {
		return false, err
	}
	stdout, err := qemu.StdoutPipe()
	if err != nil {
		return false, err
	}
	if err := qemu.Start(); err != nil {
		return false, fmt.Errorf("starting QEMU: %w", err)
	}
	output := bufio.NewReader(stdout)
	if line, err := output.ReadString('\n'); err == nil {
		up = true
		vm.showUp(strings.TrimSpace(line), kvm, time.Since(start))
		if err := talk(keyboard, output); err != nil {
			cancel() // nobody reads the port any more, and the command would wait for ever
			return up, errors.Join(err, qemu.Wait())
		}
	}
	if err := qemu.Wait(); err != nil && ctx.Err() == nil {
		return up, fmt.Errorf("running QEMU: %w", err)
	}
	return up, nil
}

func (vm *hostVM) showUp(line string, kvm bool, elapsed time.Duration) {
	by := "emulated"
	if kvm {
		by = "KVM"
	}
	phase(vm.progress, 3, vm.phases, strings.TrimSpace("host VM "+vm.number), fmt.Sprintf("up in %.1f s (%s): %s", elapsed.Seconds(), by, line))
	if vm.mode == "run" || vm.mode == "shell" {
		fmt.Fprintf(vm.progress, "%17sconsoles and logs: %s\n", "", vm.out(""))
	}
}

// show copies the command's output to ours and to a file; a shell also gets the keyboard.
func (vm *hostVM) show(to io.Writer, from *bufio.Reader) error {
	if vm.mode == "shell" {
		go io.Copy(to, vm.keyboard)
		_, err := io.Copy(os.Stdout, from)
		return err
	}
	log, err := vm.openLog()
	if err != nil {
		return err
	}
	defer log.Close()
	if _, err = io.Copy(io.MultiWriter(os.Stdout, log), from); err != nil {
		return fmt.Errorf("showing what the command prints: %w", err)
	}
	return nil
}

// openLog opens the file that has all that the commands printed.
func (vm *hostVM) openLog() (*os.File, error) {
	return os.OpenFile(vm.path(vm.out("output.log")), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
}

// command is a program that ends with ctx and with this process, out of reach of the terminal's signals.
func command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// startTPM starts a new TPM 2.0 and waits until it listens on the socket "control" of its folder.
func (vm *hostVM) startTPM(ctx context.Context) (*exec.Cmd, error) {
	state := vm.path(vm.tpm())
	if err := os.RemoveAll(state); err != nil {
		return nil, err
	}
	if err := os.Mkdir(state, 0o700); err != nil {
		return nil, err
	}
	// relative names: a socket's path has at most 107 octets
	cmd := command(ctx, vm.dir, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+vm.tpm(), "--ctrl", "type=unixio,path="+vm.tpm()+"/control",
		"--flags", "startup-clear", "--terminate")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting swtpm: %w", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		if _, err := os.Stat(filepath.Join(state, "control")); err == nil {
			return cmd, nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return nil, errors.New("swtpm made no socket within 10 s")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (vm *hostVM) arguments(kvm bool) []string {
	// Emulated, a host of several processors is not sound while KVM guests run on it; its guests are reset or it panics.
	accelerator := []string{"-accel", "tcg", "-cpu", "max", "-smp", "1"}
	if kvm {
		accelerator = []string{"-accel", "kvm", "-cpu", "host", "-smp", strconv.Itoa(min(runtime.NumCPU(), 4))}
	}
	port := "virtserialport,name=lab"
	if vm.mode == "shell" {
		port = "virtconsole"
	}
	return append(accelerator,
		"-m", strconv.Itoa(memory), "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", vm.kernel(), "-initrd", "share/host.cpio",
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off systemd.log_target=journal systemd.show_status=no",
		"-serial", "file:"+vm.out("console.log"),
		"-device", "virtio-serial-pci", "-chardev", "stdio,id=command,signal=off", "-device", port+",chardev=command",
		"-chardev", "socket,id=tpm,path="+vm.tpm()+"/control", "-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm",
		"-fsdev", "local,id=tree,security_model=none,multidevs=remap,readonly=on,path="+escape(filepath.Join(vm.tree, "tree")),
		"-device", "virtio-9p-pci,fsdev=tree,mount_tag=tree",
		"-fsdev", "local,id=share,security_model=none,readonly=on,path=share", "-device", "virtio-9p-pci,fsdev=share,mount_tag=share",
		"-fsdev", "local,id=out,security_model=none,path="+vm.out(""), "-device", "virtio-9p-pci,fsdev=out,mount_tag=out")
}

// qemu is the tree's QEMU for the host VM, with the tree's libraries and nothing of this machine's.
func (vm *hostVM) qemu(ctx context.Context, args ...string) *exec.Cmd {
	libraries := filepath.Join(vm.tree, "tree/usr/lib/x86_64-linux-gnu")
	root := filepath.Join(vm.tree, "qemu/usr")
	loader := []string{"--library-path", libraries, filepath.Join(root, "bin/qemu-system-x86_64"),
		"-L", filepath.Join(root, "share/qemu"), "-L", filepath.Join(root, "share/seabios")}
	cmd := command(ctx, vm.dir, filepath.Join(libraries, "ld-linux-x86-64.so.2"), append(loader, args...)...)
	cmd.Env = append(os.Environ(), "QEMU_MODULE_DIR="+filepath.Join(root, "lib/x86_64-linux-gnu/qemu"))
	return cmd
}

// escape writes a comma as QEMU's options want it.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// kvmWorks says whether a virtual machine runs under this machine's KVM and would have KVM itself. That /dev/kvm is there
// says neither, so one is started, for at most 5 s.
func (vm *hostVM) kvmWorks(ctx context.Context) bool {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	output, err := vm.qemu(ctx, "-accel", "kvm", "-cpu", "host", "-m", "256", "-no-user-config",
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", vm.kernel(), "-initrd", "share/host.cpio",
		"-append", "console=ttyS0 quiet panic=-1 lab=probe").Output()
	return err == nil && (strings.Contains(string(output), "probe: svm") || strings.Contains(string(output), "probe: vmx"))
}
