package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"keybroker/e2e/domain"
	"keybroker/inject"
	"keybroker/internal/daemon"
)

// tape holds what the host has sent over vsock to the agents of its guests, octet by octet.
type tape struct {
	mu   sync.Mutex
	sent map[uint32][]byte // by CID
}

// record tapes all vsock traffic of this host, by the kernel's own monitor, until the test ends.
func record(ctx context.Context, t *testing.T) *tape {
	t.Helper()
	const name = "lab-vsockmon"
	sh(ctx, t, "modprobe vsockmon && ip link add "+name+" type vsockmon && ip link set "+name+" up")
	t.Cleanup(func() { sh(context.WithoutCancel(ctx), t, "ip link del "+name) })
	device, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00 // in the network's order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, all)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: device.Index}); err != nil {
		t.Fatal(err)
	}
	socket := os.NewFile(uintptr(fd), name)
	r, done := &tape{sent: map[uint32][]byte{}}, make(chan struct{})
	go func() {
		defer close(done)
		packet := make([]byte, 1<<18)
		for {
			n, err := socket.Read(packet)
			if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.ENETDOWN) {
				return
			}
			if err == nil {
				r.add(packet[:n])
			}
		}
	}()
	t.Cleanup(func() { socket.Close(); <-done })
	return r
}

// add keeps the payload of a packet from the host to an agent. See linux/vsockmon.h.
func (r *tape) add(packet []byte) {
	const header, payload = 32, 4
	if len(packet) < header {
		return
	}
	from, to := binary.LittleEndian.Uint64(packet), binary.LittleEndian.Uint64(packet[8:])
	port, op := binary.LittleEndian.Uint32(packet[20:]), binary.LittleEndian.Uint16(packet[24:])
	body := header + int(binary.LittleEndian.Uint16(packet[28:]))
	if from != vsock.Host || port != inject.Port || op != payload || body > len(packet) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent[uint32(to)] = append(r.sent[uint32(to)], packet[body:]...)
}

// answers cuts what was sent to a guest into HTTP answers.
func (r *tape) answers(cid uint32) (each [][]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	source := bytes.NewReader(r.sent[cid])
	in := bufio.NewReader(source)
	for at := 0; ; {
		response, err := http.ReadResponse(in, nil)
		if err != nil {
			return each
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			return each
		}
		end := len(r.sent[cid]) - source.Len() - in.Buffered()
		each = append(each, r.sent[cid][at:end])
		at = end
	}
}

// replay dials a guest as only the host's root can, and gives recorded answers, one for each request.
func replay(t *testing.T, cid uint32, answers ...[]byte) {
	t.Helper()
	conn, err := daemon.DialGuest(t.Context(), cid, inject.Port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(guestLimit))
	in := bufio.NewReader(conn)
	for _, answer := range answers {
		request, err := http.ReadRequest(in)
		if err != nil {
			return // the agent has hung up: it did not believe the answer before
		}
		if _, err := io.Copy(io.Discard, request.Body); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(answer); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := http.ReadRequest(in); err == nil {
		t.Error("the agent believed the last answer: it goes on with this connection")
	}
}

// disbelieves holds that the agent's console has the text when something was done, and that it waits on.
func (g *guest) disbelieves(text string, do func()) {
	g.t.Helper()
	if line := g.says(text, do); !strings.Contains(line, "waiting on") {
		g.t.Errorf("the console says %q, expected that it waits on", line)
	}
}

// TestRecordedAnswers: an answer of the real broker that somebody has recorded is of no use: not for another VM, and not for the
// same one under another receiver's key.
func TestRecordedAnswers(t *testing.T) {
	ctx := operated(t)
	tape := record(ctx, t)
	g := admitted(ctx, t, "recorded")
	other := admitted(ctx, t, "other")
	admit(ctx, t, "other", "") // it waits
	g.start()
	g.open()
	cid, err := g.CID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	answers := tape.answers(cid)
	if len(answers) < 2 || !bytes.Contains(answers[0], []byte(`"nonce"`)) || !bytes.Contains(answers[1], []byte(`"sig"`)) {
		t.Fatalf("recorded %d answers: %q", len(answers), answers)
	}
	challenge, release := answers[0], answers[1]

	from := other.ConsoleEnd()
	other.start()
	other.expect(from, "refused: no-policy")
	at, err := other.CID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("another VM's, as they are", func(t *testing.T) {
		on := &guest{other.Spec, t, ctx}
		on.disbelieves("the issuer takes this machine for another: expected \""+other.UUID, func() { replay(t, at, challenge, release) })
	})
	t.Run("another VM's, under this one's name", func(t *testing.T) {
		on := &guest{other.Spec, t, ctx}
		renamed := bytes.ReplaceAll(challenge, []byte(g.UUID), []byte(other.UUID))
		on.disbelieves("not signed by the pinned issuer", func() { replay(t, at, renamed, release) })
	})
	t.Run("its own, to another receiver", func(t *testing.T) {
		on := &guest{g.Spec, t, ctx}
		on.run("killall keybroker-agent; cryptsetup close data")
		from := on.agentAgain("/run/keybroker-agent")
		on.expect(from, "receiver-taken")
		on.disbelieves("not signed by the pinned issuer", func() { replay(t, cid, challenge, release) })
	})
	t.Run("the real broker is waited for", func(t *testing.T) {
		on := &guest{other.Spec, t, ctx}
		if on.run("ls /dev/mapper") != "control" {
			t.Error("a volume is open")
		}
		permit(ctx, t, other.Spec, "")
		on.open()
		if got := on.releases(); got != 1 {
			t.Errorf("the audit has %d releases, expected 1", got)
		}
	})
}

// TestReservedCIDs: nobody is a VM by being CID 1 or 2, the addresses of this machine itself.
func TestReservedCIDs(t *testing.T) {
	ctx := operated(t)
	g := admitted(ctx, t, "reserved")
	listener, err := vsock.ListenContextID(unix.VMADDR_CID_LOCAL, inject.Port, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	process := exec.CommandContext(ctx, "sh", "-c", "read x", "qemu", "-uuid", g.UUID, "-name", "guest="+g.Name)
	if _, err := process.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Process.Kill(); process.Wait() })

	for cid := 1; cid <= 2; cid++ {
		t.Run(fmt.Sprint("CID ", cid), func(t *testing.T) {
			g := &guest{g.Spec, t, ctx}
			xml := strings.Replace(g.XML(), "<cid auto='yes'/>", fmt.Sprintf("<cid auto='no' address='%d'/>", cid), 1)
			path := filepath.Join(g.Dir(), "reserved.xml")
			if err := os.WriteFile(path, []byte(xml), 0o644); err != nil {
				t.Fatal(err)
			}
			if out, err := domain.Virsh(step(ctx, t), "define", path); err == nil {
				t.Errorf("libvirt defines it: %s", out)
			}
			says := fmt.Sprintf("CID %d is outside 3 to", cid)
			if out := sh(ctx, t, "/etc/libvirt/hooks/qemu.d/keybroker "+g.Name+" started begin - 2>&1 <"+path); !strings.Contains(out, says) {
				t.Errorf("the hook says %q, expected %q", out, says)
			}
			event := fmt.Sprintf(`{"operation":"%%s","suboperation":"begin","extra":"-","uuid":%q,"name":%q,"cid":%d,"offered":["disk"],"pid":%d}`,
				g.UUID, g.Name, cid, process.Process.Pid)
			for _, operation := range []string{"prepare", "started"} {
				out := sh(ctx, t, "curl -s -w '%{http_code}' --unix-socket /run/keybroker/hook.sock http://localhost/v1/hook -d '"+fmt.Sprintf(event, operation)+"'")
				if !strings.Contains(out, says) || !strings.HasSuffix(out, "400") {
					t.Errorf("the broker takes an event about it: %s", out)
				}
			}
			if out := sh(ctx, t, "journalctl -b --no-pager -u keybroker.service"); !strings.Contains(out, says) {
				t.Errorf("the journal does not have %q", says)
			}
			if v := g.shown(); runs(v) {
				t.Errorf("status has it: %+v", v)
			}
		})
	}
	if got := g.releases(); got != 0 {
		t.Errorf("the audit has %d releases", got)
	}
	mine, err := vsock.Dial(unix.VMADDR_CID_LOCAL, inject.Port, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	first, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if first.RemoteAddr().(*vsock.Addr).Port != mine.LocalAddr().(*vsock.Addr).Port {
		t.Errorf("somebody has dialled it: %v", first.RemoteAddr())
	}
}

// foreignDeadline is how long the agent of a foreign QEMU waits: long enough for a broker that dials it at all.
const foreignDeadline = "10s"

// foreign starts a QEMU without libvirt, as a user who is in group kvm and nothing else. Its guest says by its firmware that it is
// the VM of g, and has an agent and a blank disk. It takes the CID by itself, or has it by an open vhost-vsock device.
func foreign(ctx context.Context, t *testing.T, g *guest, cid uint32, device *os.File) *guest {
	t.Helper()
	spec := domain.Spec{Name: "foreign-" + g.Name, UUID: g.UUID, Agent: "deadline = \"" + foreignDeadline + "\"\n" + g.Agent}
	if err := spec.WriteFiles(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(spec.Dir()) })
	nobody, kvm := ids(t)
	for _, disk := range []string{"vda.img", "vdb.img"} {
		if err := os.Chown(filepath.Join(spec.Dir(), disk), nobody, kvm); err != nil {
			t.Fatal(err)
		}
	}
	console, err := os.Create(spec.Console())
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	vsockDevice := fmt.Sprintf("vhost-vsock-pci,guest-cid=%d", cid)
	if device != nil {
		vsockDevice += ",vhostfd=3"
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-name", "guest="+g.Name, "-uuid", g.UUID, "-machine", "pc,accel=kvm", "-cpu", "host",
		"-m", "192", "-display", "none", "-nodefaults", "-no-reboot", "-kernel", spec.Kernel(), "-initrd", filepath.Join(spec.Dir(), "initrd"),
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off", "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-device", "virtio-serial-pci", "-chardev", "null,id=commands", "-device", "virtconsole,chardev=commands",
		"-drive", "if=virtio,format=raw,file="+filepath.Join(spec.Dir(), "vda.img"), "-drive", "if=virtio,format=raw,file="+filepath.Join(spec.Dir(), "vdb.img"),
		"-device", vsockDevice)
	cmd.Stdout, cmd.Stderr = console, console
	if device != nil {
		cmd.ExtraFiles = []*os.File{device}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(nobody), Gid: uint32(kvm)}, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f := &guest{spec, t, ctx}
	t.Cleanup(func() {
		if t.Failed() {
			f.logConsole()
		}
		cmd.Process.Kill()
		cmd.Wait()
	})
	return f
}

// ids are those of a user who has nothing, and of the group that may open /dev/vhost-vsock.
func ids(t *testing.T) (nobody, kvm int) {
	t.Helper()
	u, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	g, err := user.LookupGroup("kvm")
	if err != nil {
		t.Fatal(err)
	}
	nobody, err = strconv.Atoi(u.Uid)
	if err == nil {
		kvm, err = strconv.Atoi(g.Gid)
	}
	if err != nil {
		t.Fatal(err)
	}
	return nobody, kvm
}

// grab takes a CID by a vhost-vsock device of its own, the moment that it is free.
func grab(ctx context.Context, t *testing.T, cid uint32) *os.File {
	t.Helper()
	const setGuestCID = 0x4008af60 // VHOST_VSOCK_SET_GUEST_CID
	device, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { device.Close() })
	wanted := uint64(cid)
	for within := step(ctx, t); ; {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), setGuestCID, uintptr(unsafe.Pointer(&wanted)))
		if errno == 0 {
			return device
		}
		if errno != unix.EADDRINUSE || within.Err() != nil {
			t.Fatalf("taking CID %d: %v", cid, errno)
		}
	}
}

// TestForeignQEMU: who may open /dev/vhost-vsock can be any free CID, and say by its firmware that it is any VM. The broker gives
// keys to VMs that libvirt runs alone.
func TestForeignQEMU(t *testing.T) {
	ctx := operated(t)
	off, killed := admitted(ctx, t, "off"), admitted(ctx, t, "killed")
	const freeCID = 4711

	// Before its guest's agent asks: the processors of this VM never ran.
	killed.virsh("start", "--paused")
	v := killed.until("about to be served", func(v daemon.VMStatus) bool { return v.Ticket == "unused" })
	cid, err := killed.CID(ctx)
	if err != nil {
		t.Fatal(err)
	}

	// The broker hears of nothing before the foreign guests are up: the moment that is worst for it.
	t.Cleanup(func() { signalBroker(context.WithoutCancel(ctx), t, "CONT") })
	signalBroker(ctx, t, "STOP")
	if err := syscall.Kill(v.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	stolen := foreign(ctx, t, killed, cid, grab(ctx, t, cid))
	free := foreign(ctx, t, off, freeCID, nil)
	for _, f := range []*guest{stolen, free} {
		f.expect(0, "waiting for the broker")
	}
	signalBroker(ctx, t, "CONT")

	for what, victim := range map[string]*guest{"the CID of a killed VM": killed, "a free CID": off} {
		t.Run(what, func(t *testing.T) {
			f, victim := &guest{free.Spec, t, ctx}, &guest{victim.Spec, t, ctx}
			if victim.Name == killed.Name {
				f.Spec = stolen.Spec
			}
			line, _ := f.expect(0, "the deadline is over")
			// The broker may dial once more before it knows that the process has ended; then it hangs up, or knows by the time it is asked.
			nobody := strings.Contains(line, "no broker came")
			refused := strings.Contains(line, "peer-mismatch") || strings.Contains(line, "asking the issuer: ")
			t.Log(line)
			if !strings.Contains(line, "without key disk") || !nobody && !(refused && victim.Name == killed.Name) {
				t.Errorf("its console says %q, expected that no broker came, or refused it", line)
			}
			if got := victim.releases(); got != 0 {
				t.Errorf("the audit has %d releases", got)
			}
			if v := victim.shown(); runs(v) {
				t.Errorf("status has the VM that it claims to be: %+v", v)
			}
		})
	}
	if out := sh(ctx, t, "keybroker audit query --json --event ticket --subject "+killed.UUID); !strings.Contains(lastLine(out), ": none\"") {
		t.Errorf("the audit does not end with the killed VM's ticket gone: %s", out)
	}
}

func lastLine(text string) string { return text[strings.LastIndexByte(text, '\n')+1:] }
