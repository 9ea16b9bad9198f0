package libvirt

import (
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
	"github.com/google/go-cmp/cmp"

	"keybroker/hypervisor"
)

// realLibvirt connects to a real libvirtd's test driver, to define domains there, and returns a client of its read-only socket. The
// driver keeps its domains while a connection is open.
func realLibvirt(t *testing.T) (*golibvirt.Libvirt, *Client) {
	socket := os.Getenv("LIBVIRT_SOCKET")
	if socket == "" {
		t.Skip("needs a libvirtd: start `libvirtd` and run with LIBVIRT_SOCKET=/run/libvirt/libvirt-sock (its read-only socket is beside it)")
	}
	raw, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	admin := golibvirt.NewWithDialer(dialers.NewAlreadyConnected(raw))
	if err := admin.ConnectToURI(golibvirt.TestDefault); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	c, err := New(Config{Sockets: []string{socket + "-ro"}, URI: string(golibvirt.TestDefault), RunDir: t.TempDir(), Timeout: patient, Ping: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return admin, c
}

func testDomain(number int, cid string) string {
	xml := strings.Replace(domain(number, 0).xml, "type='kvm'", "type='test'", 1)
	return strings.Replace(xml, "<devices>", "<memory unit='MiB'>8</memory><os><type>hvm</type></os><devices><vsock model='virtio'>"+cid+"</vsock>", 1)
}

func TestRealLibvirt(t *testing.T) {
	admin, c := realLibvirt(t)
	events, _ := watching(t, c)
	awaitEvent(t, events, func(e Event) bool { return e.Kind == Connected })
	web1 := domain(1, 4242)
	dom, err := admin.DomainCreateXML(testDomain(1, "<cid auto='no' address='4242'/>"), 0)
	if err != nil {
		t.Fatal(err)
	}
	ofWeb1 := func(change Change) func(Event) bool {
		return func(e Event) bool { return e.Kind == Lifecycle && e.UUID == web1.uuid && e.Change == change }
	}
	if e := awaitEvent(t, events, ofWeb1(Started)); e.Origin != hypervisor.OriginCold || e.Name != "web1" {
		t.Errorf("%+v", e)
	}
	got, err := c.Live(t.Context(), web1.uuid)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(web1.want(4242), got); diff != "" {
		t.Error(diff)
	}
	if err := admin.DomainReboot(dom, 0); err != nil {
		t.Error(err)
	}
	if err := admin.DomainSuspend(dom); err != nil {
		t.Fatal(err)
	}
	awaitEvent(t, events, ofWeb1(Suspended))
	if _, err := c.Live(t.Context(), web1.uuid); !errors.Is(err, ErrNotRunning) {
		t.Errorf("paused: %v", err)
	}
	if err := admin.DomainResume(dom); err != nil {
		t.Fatal(err)
	}
	twin, err := admin.DomainCreateXML(testDomain(2, "<cid auto='no' address='4242'/>"), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Live(t.Context(), web1.uuid); !errors.Is(err, ErrAddressTaken) {
		t.Errorf("two with one address: %v", err)
	}
	if all, err := c.List(t.Context()); err != nil || len(all) < 2 {
		t.Errorf("%d domains, %v", len(all), err)
	}
	for _, d := range []golibvirt.Domain{twin, dom} {
		if err := admin.DomainDestroy(d); err != nil {
			t.Fatal(err)
		}
	}
	awaitEvent(t, events, ofWeb1(Stopped))
	if _, err := c.Live(t.Context(), web1.uuid); !errors.Is(err, ErrNotFound) {
		t.Errorf("a transient domain that has ended: %v", err)
	}
}

// A stopped libvirtd is found out, holds nobody, and is used again when it goes on.
func TestRealLibvirtStopped(t *testing.T) {
	_, c := realLibvirt(t)
	pidFile := os.Getenv("LIBVIRT_PIDFILE")
	if pidFile == "" {
		t.Skip("needs leave to stop libvirtd for a moment: run with LIBVIRT_PIDFILE=/run/libvirtd.pid too")
	}
	data, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	c.cfg.Timeout = time.Second
	events, _ := watching(t, c)
	awaitEvent(t, events, func(e Event) bool { return e.Kind == Connected })
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	if e := awaitEvent(t, events, func(e Event) bool { return e.Kind == Disconnected }); !errors.Is(e.Err, ErrNotAnswering) {
		t.Errorf("%+v", e)
	}
	if _, err := c.Live(t.Context(), domain(1, 0).uuid); !errors.Is(err, ErrNotAnswering) {
		t.Errorf("%v", err)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	awaitEvent(t, events, func(e Event) bool { return e.Kind == Connected })
}
