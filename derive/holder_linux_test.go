package derive

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// For what takes no time unless something is broken.
const patience = 30 * time.Second

func init() {
	// A keyholder that never says a word, and one that says too much.
	programs["silent"] = func([]string) error {
		_, err := io.Copy(io.Discard, os.NewFile(HolderSocketFD, "socket"))
		return err
	}
	programs["chatty"] = func([]string) error {
		return writeAll(HolderSocketFD, []byte("hello, this is no keyholder\n"))
	}
	programs["older"] = func([]string) error {
		hello := make([]byte, helloSize)
		err := writeAll(HolderSocketFD, appendAnswer(nil, statusOK, hello))
		_, _ = io.Copy(io.Discard, os.NewFile(HolderSocketFD, "socket"))
		return err
	}
}

func deriveFrom(t testing.TB, h *Holder, generation uint32, v vector) []byte {
	t.Helper()
	if v.vm.Tier != "" {
		k, err := h.VMKey(context.Background(), generation, v.vm)
		if err != nil {
			t.Fatal(err)
		}
		return octetsOf(t, k)
	}
	k, err := h.ServiceKey(context.Background(), generation, v.name, v.epoch, v.length)
	if err != nil {
		t.Fatal(err)
	}
	return octetsOf(t, k)
}

// checkEqual holds a keyholder to the schedules of its generations.
func checkEqual(t *testing.T, h *Holder, schedules ...*Schedule) {
	t.Helper()
	if h.Realm() != schedules[0].RealmID() {
		t.Errorf("realm %s", h.Realm())
	}
	wantOctets(t, "identity", h.Identity(), schedules[0].Identity())
	for i, s := range schedules {
		for _, v := range allVectors() {
			wantOctets(t, fmt.Sprintf("generation %d, %+v", i+1, v), deriveFrom(t, h, uint32(i+1), v), v.derive(t, s))
		}
	}
	for _, label := range []string{LabelRelease, LabelAudit} {
		for _, fields := range [][][]byte{nil, {nil}, {[]byte("T"), nil, []byte("ct")}, {make([]byte, maxMessage-4)}} {
			want, err := schedules[0].Sign(label, fields...)
			if err != nil {
				t.Fatal(err)
			}
			got, err := h.Sign(context.Background(), label, fields...)
			if err != nil {
				t.Fatal(err)
			}
			wantOctets(t, label, got, want) // Ed25519 is deterministic
		}
	}
}

func TestHolderEqualsSchedule(t *testing.T) {
	eachKind(t, func(t *testing.T, newPage func() *os.File) {
		golden, err := NewMaster(unhex(t, goldenMaster))
		if err != nil {
			t.Fatal(err)
		}
		page := newPage()
		if err := FillPage(page, []Master{golden, testMaster(t, 1)}); err != nil {
			t.Fatal(err)
		}
		h := testHolder(t, page)
		checkEqual(t, h, goldenSchedule(t), testSchedule(t, 1))
		for _, g := range goldenKeys {
			wantOctets(t, fmt.Sprintf("%+v", g.vector), deriveFrom(t, h, 1, g.vector), unhex(t, g.key))
		}
	})
}

// After a keyholder is killed, the next one from the same page is the same realm.
func TestHolderHandOver(t *testing.T) {
	eachKind(t, func(t *testing.T, newPage func() *os.File) {
		page := newPage()
		if err := FillPage(page, []Master{testMaster(t, 0), testMaster(t, 1)}); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			h := testHolder(t, page)
			checkEqual(t, h, testSchedule(t, 0), testSchedule(t, 1))
			if err := syscall.Kill(h.PID(), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "its end", h.Done())
		}
	})
}

func waitFor(t testing.TB, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("waited %s for %s", patience, what)
	}
}

func TestHolderConcurrent(t *testing.T) {
	h, s := testHolder(t, testPage(t, testMaster(t, 0))), testSchedule(t, 0)
	var wg sync.WaitGroup
	for caller := range 64 {
		wg.Go(func() {
			for i := range 50 {
				want, err := s.ServiceKey(fmt.Sprintf("db-%d-%d", caller, i), 1, 32+32*(i%2))
				if err != nil {
					t.Error(err)
					return
				}
				got, err := h.ServiceKey(context.Background(), 1, fmt.Sprintf("db-%d-%d", caller, i), 1, 32+32*(i%2))
				if err != nil || !got.Equal(want) {
					t.Errorf("caller %d got another's key, or none: %v", caller, err)
					return
				}
				if _, err := h.ServiceKey(context.Background(), 9, "a", 1, 32); !errors.Is(err, ErrGeneration) {
					t.Errorf("generation 9: %v", err)
					return
				}
			}
			signature, err := h.Sign(context.Background(), LabelAudit, []byte{byte(caller)})
			if err != nil || !ed25519.Verify(h.Identity(), signedTuple(LabelAudit, [][]byte{{byte(caller)}}), signature) {
				t.Errorf("caller %d: a wrong signature, or none: %v", caller, err)
			}
		})
	}
	wg.Wait()
}

func TestHolderRefusesBeforeItAsks(t *testing.T) {
	h := testHolder(t, testPage(t, testMaster(t, 0)))
	ctx := context.Background()
	for what, err := range map[string]error{
		"name":     second(h.ServiceKey(ctx, 1, "Not A Name", 1, 32)),
		"epoch":    second(h.ServiceKey(ctx, 1, "a", 0, 32)),
		"length":   second(h.ServiceKey(ctx, 1, "a", 1, 33)),
		"tier":     second(h.VMKey(ctx, 1, VMKeyID{"user", testSubject, "a", 1, 32})),
		"label":    second(h.Sign(ctx, "keybroker/v1 session", nil)),
		"too long": second(h.Sign(ctx, LabelAudit, make([]byte, maxMessage+1))),
		"zero":     second(h.ServiceKey(ctx, 0, "a", 1, 32)),
	} {
		if err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if _, err := h.ServiceKey(ctx, 1, "a", 1, 32); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// What a broker that was taken over could send is refused by the process itself.
func TestHolderProcessRefuses(t *testing.T) {
	h := testHolder(t, testPage(t, testMaster(t, 0)))
	for name, r := range refusedRequests() {
		b, err := h.ask(context.Background(), r)
		if !errors.Is(err, ErrRefused) && !errors.Is(err, ErrGeneration) || b != nil {
			t.Errorf("%s: %x, %v", name, b, err)
		}
	}
	if _, err := h.ServiceKey(context.Background(), 1, "a", 1, 32); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// A request that is none is answered so, and ends the process with a status that is no success.
func TestHolderProcessMalformed(t *testing.T) {
	for name, frame := range malformed {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h, err := startProcess(testPage(t, testMaster(t, 0)), holderCommand)
			if err != nil {
				t.Fatal(err)
			}
			defer h.conn.Close()
			if _, err := h.conn.Write(frame); err != nil {
				t.Fatal(err)
			}
			_ = h.conn.SetReadDeadline(time.Now().Add(patience))
			answer := make([]byte, 5)
			if _, err := io.ReadFull(h.conn, answer); err != nil || answer[4] != statusMalformed {
				t.Errorf("answered %x, %v", answer, err)
			}
			if h.cmd.Wait() == nil {
				t.Error("the process ended with success")
			}
		})
	}
}

func TestHolderOfBadPages(t *testing.T) {
	damaged := memfd(t, pageSize, sizeSeals)
	if _, err := damaged.WriteAt(filledPage(t, testMaster(t, 0))[:1000], 1); err != nil {
		t.Fatal(err)
	}
	regular, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer regular.Close()
	for what, c := range map[string]struct {
		page *os.File
		want error
	}{
		"empty":   {testPage(t), ErrEmptyPage},
		"damaged": {damaged, ErrForeignPage},
		"a file":  {regular, ErrForeignPage},
		"none":    {nil, ErrForeignPage},
	} {
		h, err := StartHolder(context.Background(), c.page, HolderConfig{Command: holderCommand})
		if !errors.Is(err, c.want) || h != nil {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
	}
}

func TestStartHolderFails(t *testing.T) {
	page := testPage(t, testMaster(t, 0))
	start := func(ctx context.Context, argv ...string) error {
		h, err := StartHolder(ctx, page, HolderConfig{Command: argv})
		if h != nil {
			t.Errorf("%q: a holder and %v", argv, err)
		}
		return err
	}
	ctx := context.Background()
	if start(ctx) == nil {
		t.Error("no command was accepted")
	}
	if err := start(ctx, "/nonexistent"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing program: %v", err)
	}
	if err := start(ctx, "/bin/false"); !errors.Is(err, ErrHolderGone) || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("a program that fails: %v", err)
	}
	if err := start(ctx, "/proc/self/exe", "chatty"); !errors.Is(err, ErrHolderGone) {
		t.Errorf("a program that is none: %v", err)
	}
	if err := start(ctx, "/proc/self/exe", "older"); err == nil || !strings.Contains(err.Error(), "another version") {
		t.Errorf("a program of another version: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := start(short, "/proc/self/exe", "silent"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a silent program: %v", err)
	}
}

func TestHolderGoneFailsEverybody(t *testing.T) {
	h := testHolder(t, testPage(t, testMaster(t, 0)))
	if h.Err() != nil {
		t.Errorf("alive: %v", h.Err())
	}
	sendSignal(t, h, syscall.SIGSTOP)
	errs := make(chan error, 100)
	for range cap(errs) {
		go func() { errs <- second(h.ServiceKey(context.Background(), 1, "a", 1, 32)) }()
	}
	sendSignal(t, h, syscall.SIGKILL)
	for range cap(errs) {
		select {
		case err := <-errs:
			if !errors.Is(err, ErrHolderGone) {
				t.Errorf("a caller got %v", err)
			}
		case <-time.After(patience):
			t.Fatal("a caller still waits")
		}
	}
	waitFor(t, "its end", h.Done())
	if err := h.Err(); !errors.Is(err, ErrHolderGone) || !strings.Contains(err.Error(), "killed") {
		t.Errorf("afterwards: %v", err)
	}
	if _, err := h.Sign(context.Background(), LabelAudit); !errors.Is(err, ErrHolderGone) {
		t.Errorf("a later call: %v", err)
	}
}

func sendSignal(t testing.TB, h *Holder, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(h.PID(), s); err != nil {
		t.Fatal(err)
	}
}

func TestHolderClose(t *testing.T) {
	h := testHolder(t, testPage(t, testMaster(t, 0)))
	for range 2 {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := syscall.Kill(h.PID(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the process is still there: %v", err)
	}
	if err := h.Err(); !errors.Is(err, ErrHolderGone) || strings.Contains(err.Error(), "process ended with") {
		t.Errorf("after a clean end: %v", err)
	}
	if _, err := h.ServiceKey(context.Background(), 1, "a", 1, 32); !errors.Is(err, ErrHolderGone) {
		t.Errorf("a later call: %v", err)
	}
}

// One that does not react is ended by force.
func TestHolderCloseStopped(t *testing.T) {
	h := testHolder(t, testPage(t, testMaster(t, 0)))
	sendSignal(t, h, syscall.SIGSTOP)
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	if err := h.Err(); !errors.Is(err, ErrHolderGone) || !strings.Contains(err.Error(), "killed") {
		t.Errorf("afterwards: %v", err)
	}
}

// A caller that gave up does not shift the answers of the others.
func TestHolderCallerGivesUp(t *testing.T) {
	h, s := testHolder(t, testPage(t, testMaster(t, 0))), testSchedule(t, 0)
	sendSignal(t, h, syscall.SIGSTOP)
	for i := range 10 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		if _, err := h.ServiceKey(ctx, 1, fmt.Sprint("given-up-", i), 1, 32); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waiting for a stopped keyholder: %v", err)
		}
		cancel()
	}
	sendSignal(t, h, syscall.SIGCONT)
	wantOctets(t, "the next key", deriveFrom(t, h, 1, service("a", 1, 32)), service("a", 1, 32).derive(t, s))
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := h.Sign(cancelled, LabelAudit); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}
}

// What piles up for a keyholder that hangs is bounded, and it recovers.
func TestHolderBusy(t *testing.T) {
	h, s := testHolder(t, testPage(t, testMaster(t, 0))), testSchedule(t, 0)
	sendSignal(t, h, syscall.SIGSTOP)
	for range maxWaiting {
		if err := h.send(&call{ready: make(chan struct{}, 1)}, deriveRequest(1, 32, []byte("a"))); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := h.ServiceKey(ctx, 1, "a", 1, 32); !errors.Is(err, ErrHolderBusy) {
		t.Errorf("one more: %v", err)
	}
	last := &call{ready: make(chan struct{}, 1)}
	h.mu.Lock()
	h.waiting[len(h.waiting)-1] = last
	h.mu.Unlock()
	sendSignal(t, h, syscall.SIGCONT)
	waitFor(t, "the last answer", last.ready)
	wantOctets(t, "a key", deriveFrom(t, h, 1, service("b", 1, 32)), service("b", 1, 32).derive(t, s))
}

// A terminal or service manager signals the whole group: the keyholder serves on until its broker is done.
func TestHolderIgnoresSignals(t *testing.T) {
	h := testHolder(t, testPage(t, testMaster(t, 0)))
	for _, s := range []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2} {
		sendSignal(t, h, s)
		if _, err := h.ServiceKey(context.Background(), 1, "a", 1, 32); err != nil {
			t.Fatalf("after %s: %v", s, err)
		}
	}
}

// Started by hand, it says that this is not for hands.
func TestServeHolderByHand(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := ServeHolder(int(f.Fd()), int(f.Fd())); err == nil || !strings.Contains(err.Error(), "the broker starts the keyholder") {
		t.Errorf("started without a socket: %v", err)
	}
}
