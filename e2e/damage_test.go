package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/internal/daemon"
)

// A client is a connection of some user to the Unix socket.
type client struct {
	t       *testing.T
	conn    net.Conn
	answers *bufio.Reader
}

// clientOf connects as another user.
func clientOf(t *testing.T, uid int) *client {
	t.Helper()
	const same = ^uintptr(0)
	setUser := func(uid int) {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, same, uintptr(uid), same); errno != 0 { // of this thread alone
			t.Fatalf("becoming user %d: %v", uid, errno)
		}
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	setUser(uid)
	conn, err := net.Dial("unix", "/run/keybroker/keybroker.sock")
	setUser(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{t, conn, bufio.NewReader(conn)}
}

// key asks for a service's key and returns the status and the body.
func (c *client) key(name string) (int, string) {
	c.t.Helper()
	c.conn.SetDeadline(time.Now().Add(guestLimit))
	fmt.Fprintf(c.conn, "GET /v1/keys/%s HTTP/1.1\r\nHost: localhost\r\nKeybroker: 1\r\n\r\n", name)
	response, err := http.ReadResponse(c.answers, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return response.StatusCode, string(body)
}

// smallDisk puts the audit log on a file system of its own with so much room, until the test ends.
func smallDisk(ctx context.Context, t *testing.T, room int) {
	t.Helper()
	const folder = stateFolder + "/audit"
	sh(ctx, t, "systemctl stop keybroker.service")
	sh(ctx, t, fmt.Sprintf(`mkdir /run/small; mount -t tmpfs -o size=$(($(du -s --apparent-size -B 1 %[1]s | cut -f 1) + %[2]d)) small /run/small
		cp -a %[1]s/. /run/small; mount --bind /run/small %[1]s`, folder, room))
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		sh(ctx, t, fmt.Sprintf("systemctl stop keybroker.service; umount %[1]s; rm -rf /run/small/ballast %[1]s/*; cp -a /run/small/. %[1]s; umount /run/small; rmdir /run/small", folder))
		coldStart(ctx, t)
	})
}

// users are those who may have the service's key of TestFullDisk.
const users = 999

// A counter asks for a service's key and counts those that it got.
type counter struct {
	t       *testing.T
	service string
	keys    int
}

// ask returns the refusal's code, or "" for a key.
func (n *counter) ask(c *client) string {
	n.t.Helper()
	answer, body := c.key(n.service)
	if answer == http.StatusOK {
		n.keys++
		return ""
	}
	refusal := regexp.MustCompile(`"code":\s*"([a-z-]+)"`).FindStringSubmatch(body)
	if answer != http.StatusServiceUnavailable && answer != http.StatusTooManyRequests || refusal == nil {
		n.t.Fatalf("status %d: %s", answer, body)
	}
	return refusal[1]
}

// useUp has user after user ask for keys until there is no room for their records.
func (n *counter) useUp() {
	n.t.Helper()
	one, code := clientOf(n.t, 1), ""
	for code == "" && n.keys < 1<<16 { // the room that the log has allocated already
		code = n.ask(one)
	}
	n.t.Logf("the first user had %d keys, then %s", n.keys, code)
	if code != "busy" {
		n.t.Errorf("a user who asks too often while there is only the reserve is refused with %s", code)
	}
	for uid := 2; code != "audit-unavailable" && uid <= users; uid++ {
		user := clientOf(n.t, uid)
		for code = n.ask(user); code == ""; code = n.ask(user) {
		}
	}
	n.t.Logf("%d keys in all, then %s", n.keys, code)
	if code != "audit-unavailable" {
		n.t.Fatal("there always is room in the log")
	}
}

// recorded holds that the audit has as many releases as there were keys.
func (n *counter) recorded(ctx context.Context) {
	n.t.Helper()
	out := sh(ctx, n.t, "keybroker audit query --json --limit 0 --event release --subject "+n.service)
	if got := strings.Count(out, `"release"`); got != n.keys {
		n.t.Errorf("%d keys left, and the audit has %d records of them", n.keys, got)
	}
}

// TestFullDisk: when the audit log has no room, nobody gets a key; when it has some again, they do, without anybody's help.
func TestFullDisk(t *testing.T) {
	ctx := operated(t)
	brokerOpen(ctx, t)
	settings(t, "[audit]\nreserve = \"64KiB\"\n")
	smallDisk(ctx, t, 3<<20)
	coldStart(ctx, t)
	n := &counter{t: t, service: "e2e-full"}
	var uids []string
	for uid := range users {
		uids = append(uids, strconv.Itoa(uid+1))
	}
	admit(ctx, t, n.service, "[[service]]\nname = \""+n.service+"\"\nuid = ["+strings.Join(uids, ", ")+"]\n")
	g := admitted(ctx, t, "full")

	if code := n.ask(clientOf(t, 1)); code != "" {
		t.Fatalf("refused with %s before the disk is full", code)
	}
	sh(ctx, t, "head -c 1G /dev/zero >/run/small/ballast || [ $(df --output=avail -B 1 /run/small | tail -n 1) = 0 ]")
	n.useUp()
	n.recorded(ctx)
	sh(ctx, t, "systemctl restart keybroker.service")
	brokerOpen(ctx, t)
	before := status(ctx, t)
	if !strings.Contains(before.Audit.Trouble, "full") {
		t.Errorf("after a restart status says of the audit %q", before.Audit.Trouble)
	}
	if code := n.ask(clientOf(t, 1)); code != "audit-unavailable" {
		t.Errorf("after a restart on the full disk a service got %q", code)
	}
	from := g.ConsoleEnd()
	g.start()
	g.refusedOnFullDisk(from)

	sh(ctx, t, "rm /run/small/ballast")
	freed := time.Now()
	g.expect(from, "ready:")
	if took := time.Since(freed); took > 40*time.Second { // with formatting, emulated; a refused agent asks by itself after a minute
		t.Errorf("the guest had its key %v after there was room again", took)
	}
	g.open()
	if code := n.ask(clientOf(t, 1)); code != "" {
		t.Errorf("a service is refused with %s though there is room again", code)
	}
	n.recorded(ctx)
	after := status(ctx, t)
	if after.PID != before.PID {
		t.Error("the broker was restarted")
	}
	if after.Audit.Trouble != "" {
		t.Errorf("status still says of the audit %q", after.Audit.Trouble)
	}
	sh(ctx, t, "keybroker audit verify --identity "+pin(ctx, t))
	if out := sh(ctx, t, "keybroker audit query --json --event start"); !strings.Contains(out, "the disk was full then") {
		t.Errorf("the audit does not have the start on the full disk: %s", out)
	}
}

// refusedOnFullDisk holds that the guest, which started at this offset of its console, gets no key for want of a record.
func (g *guest) refusedOnFullDisk(from int64) {
	g.t.Helper()
	_, next := g.expect(from, "audit-unavailable")
	g.until("refused", func(v daemon.VMStatus) bool { return v.Code == "audit-unavailable" })
	if n := g.releases(); n != 0 {
		g.t.Errorf("the audit has %d releases to the guest", n)
	}
	if strings.Contains(consoleFrom(g.t, g, next), "ready:") {
		g.t.Error("the guest has its key")
	}
}

func consoleFrom(t *testing.T, g *guest, from int64) string {
	t.Helper()
	content, err := os.ReadFile(g.Console())
	if err != nil {
		t.Fatal(err)
	}
	return string(content[from:])
}

// startFails starts the unit, which must end at once, and returns what its first run wrote into the journal.
func startFails(ctx context.Context, t *testing.T) (lines []string, took time.Duration) {
	t.Helper()
	sh(ctx, t, "systemctl reset-failed keybroker.service")
	cursor := sh(ctx, t, "journalctl -n 0 --show-cursor -q | sed 's/^-- cursor: //'")
	began := time.Now()
	if out, err := exec.CommandContext(step(ctx, t), "systemctl", "start", "keybroker.service").CombinedOutput(); err == nil {
		t.Fatalf("the broker started: %s", out)
	}
	took = time.Since(began)
	sh(ctx, t, "systemctl stop keybroker.service; journalctl --sync")
	out := sh(ctx, t, "journalctl -b -q --no-pager -o cat --after-cursor '"+cursor+"' -u keybroker.service")
	for line := range strings.Lines(out) {
		lines = append(lines, strings.TrimSpace(line))
		if strings.Contains(line, "Main process exited") { // systemd then tries again
			return lines, took
		}
	}
	t.Fatalf("the journal does not say that it ended: %s", out)
	return nil, 0
}

// TestDamagedRealm: with a realm file that is cut or changed anywhere the broker ends at once, with one line that says so and that
// has nothing of the file in it; the restored file starts it again.
func TestDamagedRealm(t *testing.T) {
	ctx := operated(t)
	brokerOpen(ctx, t)
	const path = stateFolder + "/realm.json"
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sh(ctx, t, "systemctl stop keybroker.service")
	t.Cleanup(func() {
		if err := os.WriteFile(path, good, 0o600); err != nil { // the same file, with its owner
			t.Error(err)
		}
		coldStart(context.WithoutCancel(ctx), t)
		asService(context.WithoutCancel(ctx), t, "keybroker key get my-database --hex")
	})
	cut := func(n int) []byte { return good[:n] }
	flip := func(at int) []byte {
		b := bytes.Clone(good)
		b[at] ^= 0x01
		return b
	}
	n := len(good)
	for _, c := range []struct {
		name    string
		content []byte
		want    string
	}{
		{"empty", cut(0), "truncated"}, {"cut to a third", cut(n / 3), "truncated"}, {"cut by 1", cut(n - 1), "truncated"},
		{"first octet flipped", flip(0), "damaged"}, {"flipped in the middle", flip(n / 2), "damaged"}, {"flipped in its checksum", flip(n - 20), "damaged"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.WriteFile(path, c.content, 0o600); err != nil {
				t.Fatal(err)
			}
			lines, took := startFails(ctx, t)
			var errs []string
			for _, line := range lines {
				if strings.Contains(line, "keybroker: error: ") {
					errs = append(errs, line)
				}
			}
			if len(errs) != 1 || !strings.Contains(errs[0], path) || !strings.Contains(errs[0], c.want) {
				t.Errorf("the journal has %q, expected one error that names %s and says %q", lines, path, c.want)
			}
			if last := lines[len(lines)-1]; !strings.Contains(last, "code=exited, status=1/FAILURE") {
				t.Errorf("systemd says %q", last)
			}
			if took > 3*time.Second { // with systemd's own work, emulated
				t.Errorf("it took %v", took)
			}
			if found := quoted(lines, good); found != "" {
				t.Errorf("the journal has %q, which stands in the file", found)
			}
			t.Logf("%.1f s: %s", took.Seconds(), errs)
		})
	}
}

// quoted returns something that stands in the lines and is no word of the file's but a value of it, or "".
func quoted(lines []string, file []byte) string {
	for _, value := range regexp.MustCompile(`[0-9A-Za-z+/_=-]{16,}`).FindAll(file, -1) {
		for i := range len(value) - 7 {
			if piece := string(value[i : i+8]); strings.Contains(strings.Join(lines, "\n"), piece) {
				return piece
			}
		}
	}
	return ""
}

// TestMissingTPM: without its TPM the broker says what is missing, and waits for the passphrase.
func TestMissingTPM(t *testing.T) {
	ctx := operated(t)
	brokerOpen(ctx, t)
	const device, away = "/dev/tpmrm0", "/dev/tpm-away"
	waits := func(t *testing.T, want string) {
		t.Helper()
		brokerWaits(ctx, t)
		if why := status(ctx, t).Realm.Why; !strings.Contains(why, want) || !strings.Contains(why, "keybroker unlock") {
			t.Errorf("status says %q, expected %q and what to do", why, want)
		}
		if out := sh(ctx, t, "journalctl -b -q --no-pager -u keybroker.service -n 20"); !strings.Contains(out, want) {
			t.Errorf("the journal says %s, expected %q", out, want)
		}
		unlocked(ctx, t)
		asService(ctx, t, "keybroker key get my-database --hex")
	}
	t.Run("the device is gone", func(t *testing.T) {
		if err := os.Rename(device, away); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Rename(away, device); err != nil {
				t.Error(err)
			}
		})
		out, err := exec.CommandContext(step(ctx, t), "keybroker", "slot", "test").CombinedOutput()
		if err == nil || !strings.Contains(string(out), device) || !strings.Contains(string(out), "--tpm PATH names another") {
			t.Errorf("slot test: %v, %s", err, out)
		}
		startAnew(ctx, t)
		waits(t, device)
	})
	t.Run("another path", func(t *testing.T) {
		t.Cleanup(func() { coldStart(context.WithoutCancel(ctx), t) })
		settings(t, "tpm = \"/dev/tpm-of-another\"\n")
		startAnew(ctx, t)
		waits(t, "/dev/tpm-of-another")
	})
}
