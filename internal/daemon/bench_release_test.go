package daemon

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"keybroker/attest"
	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
	"keybroker/derive"
	"keybroker/inject"
	"keybroker/internal/config"
	"keybroker/internal/tuple"
)

const (
	sessions      = 256 // at once in one run of the tier 3 measurement
	moreReleases  = 4   // after the first in a session that asks again
	releaseRounds = 7
	fewGuests     = 100
	manyGuests    = 1000
)

// benchIssuer is the broker's side of a release without what the broker adds: policy, ticket, libvirt, audit and its fsync.
type benchIssuer struct {
	*inject.Issuer
	schedule *derive.Schedule
	tier     string

	// of tier snp
	guest     *snptest.Guest
	attesting *attesting
	policy    *attest.Policy
}

// newAttestedIssuer releases in tier snp, to one guest of a test's authority.
func newAttestedIssuer(b testing.TB) *benchIssuer {
	i := newBenchIssuer(b)
	ca, err := authority()
	if err != nil {
		b.Fatal(err)
	}
	if i.guest, err = ca.NewGuest(testVM); err != nil {
		b.Fatal(err)
	}
	paths := config.Paths{Endorsements: b.TempDir()}
	if i.attesting, err = newAttesting(&Broker{log: slog.New(slog.DiscardHandler), paths: paths}, []snp.Root{ca.Root()}); err != nil {
		b.Fatal(err)
	}
	report, err := i.guest.Report([snp.ReportDataSize]byte{})
	if err != nil {
		b.Fatal(err)
	}
	i.attesting.keep(context.Background(), attest.Evidence{Kind: attest.KindSNP, Octets: append(report, i.guest.Table()...)})
	i.tier, i.policy = inject.TierSNP, i.guest.Accepting()
	return i
}

// appraise is the verdict on one claim's evidence.
func (i *benchIssuer) appraise(kind string, evidence, data []byte) error {
	ev := attest.Evidence{Kind: kind, Octets: evidence}
	v := i.attesting.verifier.Appraise(snp.Request{Evidence: ev, Endorsements: i.attesting.endorsed(ev), ReportData: data, Policy: i.policy, At: time.Now()})
	if !v.Pass() {
		return fmt.Errorf("refused: %v", v.Failures())
	}
	return nil
}

func newBenchIssuer(b testing.TB) *benchIssuer {
	s, err := derive.NewSchedule(derive.RandomMaster())
	if err != nil {
		b.Fatal(err)
	}
	sign := func(_ context.Context, label string, fields ...[]byte) ([]byte, error) {
		return s.Sign(label, fields...)
	}
	return &benchIssuer{Issuer: &inject.Issuer{Identity: s.Identity(), Sign: sign, Log: slog.New(slog.DiscardHandler)}, schedule: s, tier: inject.TierVM}
}

func (i *benchIssuer) key() (derive.VMKey, error) {
	return i.schedule.VMKey(derive.VMKeyID{Tier: i.tier, Subject: testVM, Name: "disk", Epoch: 1, Length: 32})
}

func (i *benchIssuer) door() inject.Door {
	return inject.Door{
		Tier:  i.tier,
		Offer: func(context.Context, string) (string, []string, error) { return testVM, []string{"disk"}, nil },
		Decide: func(_ context.Context, c *inject.Claim) (*inject.Grant, error) {
			if i.tier == inject.TierSNP {
				if err := i.appraise(c.Kind, c.Evidence, c.Transcript[:]); err != nil {
					return nil, err
				}
			}
			k, err := i.key()
			return &inject.Grant{Keys: []inject.GrantedKey{{Name: "disk", Epoch: 1, Key: k}}}, err
		},
		Acked:   func(context.Context, *inject.Claim, []inject.Outcome) error { return nil },
		Refused: func(context.Context, *inject.Claim, inject.Refusal) {},
	}
}

// fetch is a guest's side: challenge and release, so many times, and one acknowledgement.
func fetch(r *inject.Receiver, conn net.Conn, times int) error {
	s, err := r.Session(conn)
	if err != nil {
		return err
	}
	ctx := context.Background()
	var d *inject.Delivery
	for range times {
		c, err := s.Challenge(ctx)
		if err != nil {
			return err
		}
		if d, err = s.Release(ctx, c, []inject.Want{{Name: "disk"}}); err != nil {
			return err
		}
		d.Wipe()
	}
	return d.Ack(ctx, []inject.Outcome{{Name: "disk", Epoch: 1, Sink: "luks /dev/vdb", OK: true, Opened: true}})
}

// receive is the receiver's process: on each socket that it inherited it fetches its key so many times, and acknowledges it. With a
// guest it is in tier snp.
func receive(pin, times, guest string) error {
	p, err := inject.ParsePin(pin)
	if err != nil {
		return err
	}
	key, err := inject.NewReceiverKey()
	if err != nil {
		return err
	}
	again, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	r := &inject.Receiver{Tier: inject.TierVM, Pins: []inject.Pin{p}, Key: key}
	if guest != "" {
		g, err := snptest.ParseGuest([]byte(guest))
		if err != nil {
			return err
		}
		r.Tier, r.Subject = inject.TierSNP, testVM
		r.Attest = func(_ context.Context, data inject.Transcript) ([]byte, error) {
			report, err := g.Report(data)
			return append(report, g.Table()...), err
		}
	}
	var parts sync.WaitGroup
	var failed atomic.Pointer[error]
	for n := range uintptr(sessions) {
		parts.Go(func() {
			f := os.NewFile(listenFDsStart+n, "socket")
			defer f.Close()
			conn, err := net.FileConn(f)
			if err == nil {
				defer conn.Close()
				err = fetch(r, conn, again)
			}
			if err != nil {
				failed.Store(&err)
			}
		})
	}
	parts.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// benchRelease compares the CPU time of the issuer's side of a release with that of the cryptographic operations in it. The
// receivers are another process.
func benchRelease(b *testing.T) {
	collectLess() // as a broker does
	again, first := releaseCost(b, newBenchIssuer(b))
	row("tier 3, issuer's CPU: challenge and release", micros(again.ours), micros(again.crypto), again.ratio(), aim{most: 1.3, of: "its own cryptography"})
	row("tier 3, issuer's CPU: whole session", micros(first.ours), micros(first.crypto), first.ratio(), aim{most: 1.3, of: "the same, with connection and acknowledgement"})
	again, _ = releaseCost(b, newAttestedIssuer(b))
	row("tier snp, issuer's CPU: challenge and release", micros(again.ours), micros(again.crypto), again.ratio(), aim{most: 1.5, of: "its own cryptography, with one ECDSA P-384 verification"})
}

// cost is the issuer's CPU time of a release, and that of the cryptographic operations in it.
type cost struct{ ours, crypto time.Duration }

func (c cost) ratio() float64 { return float64(c.ours) / float64(c.crypto) }

// releaseCost measures a release on a connection that is there, and a whole session.
func releaseCost(b *testing.T, i *benchIssuer) (again, first cost) {
	var agains, firsts []cost
	for range releaseRounds {
		one, many := serveReleases(b, i, 1), serveReleases(b, i, 1+moreReleases)
		crypto := cryptoOf(b, i)
		agains, firsts = append(agains, cost{(many - one) / moreReleases, crypto}), append(firsts, cost{one, crypto})
	}
	return median(agains, cost.ratio), median(firsts, cost.ratio)
}

// serveReleases returns the CPU time of a session with so many releases.
func serveReleases(b *testing.T, i *benchIssuer, times int) (each time.Duration) {
	var ours []net.Conn
	var theirs []*os.File
	for range sessions {
		conn, f := socketPair(b)
		ours, theirs = append(ours, conn), append(theirs, f)
	}
	b.Run("", func(b *testing.T) { // which ends with the receiver's process
		guest := ""
		if i.guest != nil {
			octets, err := i.guest.Encode()
			if err != nil {
				b.Fatal(err)
			}
			guest = string(octets)
		}
		startMode(b, theirs, "bench-receive", inject.PinOf(i.Identity).String(), strconv.Itoa(times), guest)
		for _, f := range theirs {
			f.Close()
		}
		before := ownCPU(b)
		var parts sync.WaitGroup
		for _, conn := range ours {
			parts.Go(func() {
				if err := i.Serve(context.Background(), conn, i.door()); err != nil {
					b.Error(err)
				}
			})
		}
		parts.Wait()
		each = (ownCPU(b) - before) / sessions
	})
	return each
}

// cryptoOf is the CPU time of what an issuer computes for one release, and no more.
func cryptoOf(b testing.TB, i *benchIssuer) time.Duration {
	sk, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		b.Fatal(err)
	}
	pk, plain, nonce := sk.PublicKey().Bytes(), make([]byte, 160), make([]byte, 32)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	digest := sha512.Sum384(nonce)
	report, err := ecdsa.SignASN1(rand.Reader, p384, digest[:])
	if err != nil {
		b.Fatal(err)
	}
	before := ownCPU(b)
	for range sessions {
		if i.tier == inject.TierSNP && !ecdsa.VerifyASN1(&p384.PublicKey, digest[:], report) {
			b.Fatal("not verified")
		}
		rand.Read(nonce)
		t := sha512.Sum512(tuple.Encode(i.Identity, []byte(testVM), nonce, pk, nonce))
		sha256.Sum256(pk)
		_, keyErr := i.key()
		public, err := hpke.MLKEM768X25519().NewPublicKey(pk)
		if err != nil {
			b.Fatal(err)
		}
		enc, sender, err := hpke.NewSender(public, hpke.HKDFSHA256(), hpke.AES256GCM(), t[:])
		if err != nil {
			b.Fatal(err)
		}
		ct, sealErr := sender.Seal(nil, plain)
		ackKey, exportErr := sender.Export("keybroker/v1 ack", 32)
		_, signErr := i.schedule.Sign(derive.LabelRelease, t[:], enc, ct)
		mac := hmac.New(sha256.New, ackKey)
		mac.Write(plain)
		if err := errors.Join(keyErr, sealErr, exportErr, signErr); err != nil || !hmac.Equal(mac.Sum(nil), mac.Sum(nil)) {
			b.Fatal(err)
		}
	}
	return (ownCPU(b) - before) / sessions
}

func ownCPU(b testing.TB) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func socketPair(b testing.TB) (net.Conn, *os.File) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	one := os.NewFile(uintptr(fds[0]), "issuer")
	defer one.Close()
	conn, err := net.FileConn(one)
	if err != nil {
		b.Fatal(err)
	}
	return conn, os.NewFile(uintptr(fds[1]), "receiver")
}

// crowd is what so many guests at once cost.
type crowd struct {
	p50, p99  time.Duration // from the start of all to the acknowledgement
	cpu       time.Duration // of one guest, both sides
	idleBytes uint64        // of the issuer's heap and stacks for a session that has its keys
}

// benchGuests lets many guests ask at the same moment, all in this process.
func benchGuests(b *testing.T) {
	collectLess()
	few, many := runCrowd(b, fewGuests), runCrowd(b, manyGuests)
	what, fewer := fmt.Sprintf("%d guests at once: ", manyGuests), fmt.Sprintf("%d guests at once", fewGuests)
	row(what+"p50 to all keys held", millis(many.p50), millis(few.p50), float64(many.p50)/float64(few.p50), aim{of: fewer})
	row(what+"p99", millis(many.p99), millis(few.p99), float64(many.p99)/float64(few.p99), aim{of: fewer})
	row(what+"memory of an idle session", fmt.Sprintf("%d KiB", many.idleBytes>>10), fmt.Sprintf("%d KiB", few.idleBytes>>10), float64(many.idleBytes)/float64(few.idleBytes), aim{of: fewer})
	row(what+"CPU of a guest, both sides", micros(many.cpu), micros(few.cpu), float64(many.cpu)/float64(few.cpu), aim{of: fewer})
}

func runCrowd(b testing.TB, guests int) (c crowd) {
	i := newBenchIssuer(b)
	key, err := inject.NewReceiverKey()
	if err != nil {
		b.Fatal(err)
	}
	r := &inject.Receiver{Tier: inject.TierVM, Pins: []inject.Pin{inject.PinOf(i.Identity)}, Key: key}
	before := memory()
	var issuers, receivers sync.WaitGroup
	times := make([]time.Duration, guests)
	ends := make([]*os.File, guests)
	start, cpu := time.Now(), ownCPU(b)
	for n := range guests {
		conn, f := socketPair(b)
		ends[n] = f
		issuers.Go(func() { i.Serve(context.Background(), conn, i.door()) })
		receivers.Go(func() {
			theirs, err := net.FileConn(f)
			if err == nil {
				err = fetch(r, theirs, 1)
				theirs.Close() // a copy: the session stays
			}
			if err != nil {
				b.Error(err)
			}
			times[n] = time.Since(start)
		})
	}
	receivers.Wait()
	c.cpu = (ownCPU(b) - cpu) / time.Duration(guests)
	c.idleBytes = (memory() - before) / uint64(guests)
	for _, f := range ends {
		f.Close()
	}
	issuers.Wait()
	slices.Sort(times)
	c.p50, c.p99 = times[guests/2], times[guests*99/100]
	return c
}

// memory is what is in use of heap and stacks.
func memory() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// benchAgent measures the guest agent as it ships.
func benchAgent(b *testing.T) {
	dir := b.TempDir()
	agent, config := filepath.Join(dir, "keybroker-agent"), filepath.Join(dir, "agent.toml")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", agent, "keybroker/cmd/guest-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	text := fmt.Sprintf("tier = \"vm\"\nbroker = [%q]\n[[key]]\nname = \"disk\"\nsink = \"luks\"\ndevice = \"/dev/vdb\"\nmapper = \"data\"\n", inject.PinOf(make(ed25519.PublicKey, 32)))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	st, err := os.Stat(agent)
	if err != nil {
		b.Fatal(err)
	}
	row("agent: size, static and stripped", fmt.Sprintf("%.1f MB", float64(st.Size())/1e6), "8 MB", float64(st.Size())/8e6, aim{most: 1, of: "its limit"})
	memory := memoryDir(b)
	var starts []time.Duration
	var peak int
	for n := range 21 {
		took, kib := startAgent(b, agent, config, filepath.Join(memory, fmt.Sprint(n)))
		starts, peak = append(starts, took), max(peak, kib)
	}
	row("agent: from exec to waiting for the broker", millis(median(starts, time.Duration.Seconds)), "", 0, aim{})
	row("agent: peak RSS so far", fmt.Sprintf("%.1f MB", float64(peak)/1e3), "20 MB", float64(peak)/20e3, aim{most: 1, of: "its limit"})
}

// memoryDir is a folder in memory, where the agent's state must be.
func memoryDir(b testing.TB) string {
	for _, parent := range []string{os.Getenv("XDG_RUNTIME_DIR"), "/run", "/dev/shm"} {
		var fs unix.Statfs_t
		if unix.Statfs(parent, &fs) != nil || fs.Type != unix.TMPFS_MAGIC {
			continue
		}
		if dir, err := os.MkdirTemp(parent, "keybroker-bench"); err == nil {
			b.Cleanup(func() { os.RemoveAll(dir) })
			return dir
		}
	}
	dir := b.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=700"); err != nil {
		b.Skipf("no tmpfs to write to and none can be mounted (%v): run it as root", err)
	}
	b.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// startAgent runs the agent until it waits for the broker.
func startAgent(b testing.TB, agent, config, state string) (took time.Duration, peakKiB int) {
	cmd := exec.Command(agent, "-config", config, "-state-dir", state)
	out, err := cmd.StderrPipe()
	start := time.Now()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.Contains(lines.Text(), "waiting for the broker") {
		b.Log(lines.Text())
	}
	took = time.Since(start)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, ok := bytes.Cut(status, []byte("VmHWM:"))
	if _, err := fmt.Sscan(string(rest), &peakKiB); !ok || err != nil {
		b.Fatalf("no peak RSS: %v", err)
	}
	return took, peakKiB
}
