package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"

	"keybroker/derive"
	"keybroker/inject"
	"keybroker/internal/audit"
	"keybroker/internal/config"
	"keybroker/seal"
)

// States of the realm, as status shows them.
const (
	realmOpening = "opening" // the opener tries the slots
	realmWaiting = "waiting" // no slot opened by itself: somebody must say `keybroker unlock`
	realmOpen    = "open"
	realmLocked  = "locked" // by `keybroker lock`, or because nothing can open it

	lockedByHand = "locked by an administrator"
)

// errHolderLost ends the broker: systemd starts it anew and hands it the keyholder's page again.
var errHolderLost = errors.New("the keyholder ended; restarting to resume from the page that systemd keeps")

// realm keeps the keyholder: it starts one from the page that systemd kept, or has the opener fill a new page. The master and
// what opens it never enter this process.
type realm struct {
	cfg    *config.Config
	file   string   // realm.json
	self   string   // this program's path
	unlock *os.File // the listener that the opener accepts passphrases on
	log    *slog.Logger
	events func(event audit.Event, detail string) error // writes the audit
	opened func()                                       // called whenever the realm has been opened
	openUp chan struct{}                                // asks run to try the slots again

	byHand sync.Mutex // held by lock until all of it is done, so that tryAgain comes before or after it; taken before mu

	mu      sync.RWMutex
	holder  *derive.Holder
	opening *opening // nil: none is under way
	shut    bool     // locked by hand: nothing is opened until tryAgain
	state   string
	why     string // of a state other than open
	slot    string // which opened it; "" after a resume
	stored  bool   // systemd keeps the page
	memory  string // memfd_secret or memfd
}

func newRealm(cfg *config.Config, file string, unlock *os.File, log *slog.Logger) *realm {
	return &realm{cfg: cfg, file: file, self: "/proc/self/exe", unlock: unlock, log: log, state: realmOpening, openUp: make(chan struct{}, 1)}
}

// current returns the keyholder, or why there is none.
func (r *realm) current() (*derive.Holder, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.holder == nil {
		return nil, inject.Refusal{Code: inject.CodeLocked, Reason: "the realm is not open: " + r.why, Next: "`keybroker status` says what it waits for"}
	}
	return r.holder, nil
}

// sign signs with the identity of the realm, while it is open.
func (r *realm) sign(ctx context.Context, label string, fields ...[]byte) ([]byte, error) {
	h, err := r.current()
	if err != nil {
		return nil, err
	}
	return h.Sign(ctx, label, fields...)
}

func (r *realm) set(state, why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.show(state, why)
}

// show is set for who holds the lock.
func (r *realm) show(state, why string) {
	if r.state == state && r.why == why {
		return
	}
	r.state, r.why = state, why
	if why == "" {
		r.log.Info("realm", "state", state)
	} else {
		r.log.Info("realm", "state", state, "why", why)
	}
	notify("STATUS=realm " + state + strings.TrimSuffix(": "+why, ": "))
}

// run keeps the realm open until ctx ends. page is what systemd kept, or nil. ready is called once, when the first attempt has
// come to an end: open, waiting for a human, or locked.
func (r *realm) run(ctx context.Context, page *os.File, ready func()) error {
	var once sync.Once
	isReady := func() { once.Do(ready) }
	defer isReady()
	h := r.attempt(ctx, func(ctx context.Context) (*derive.Holder, string) { return r.resume(ctx, page) })
	for ctx.Err() == nil {
		if h == nil {
			h = r.attempt(ctx, func(ctx context.Context) (*derive.Holder, string) { return r.open(ctx, isReady) })
		}
		if h != nil {
			r.opened()
		}
		isReady()
		if h != nil {
			lost, err := r.hold(ctx, h)
			if err != nil {
				return err
			}
			if h = nil; lost {
				continue
			}
		}
		select {
		case <-r.openUp:
		case <-ctx.Done():
		}
	}
	return nil
}

// opening is an attempt to open the realm that is under way.
type opening struct {
	cancel  context.CancelFunc
	done    chan struct{}
	revoked bool // the realm was locked meanwhile
}

// attempt has get start a keyholder, and puts it to service unless the realm is locked by then. get also says how it was
// opened, for the audit.
func (r *realm) attempt(ctx context.Context, get func(context.Context) (h *derive.Holder, how string)) *derive.Holder {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	o := &opening{cancel: cancel, done: make(chan struct{})}
	defer close(o.done)
	if !r.begin(o) {
		return nil
	}
	h, how := get(ctx)
	if r.adopt(o, h, how) {
		return h
	}
	if h != nil {
		h.Close()
		forgetFD(fdPage)
	}
	return nil
}

func (r *realm) begin(o *opening) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.shut {
		r.opening = o
	}
	return !r.shut
}

// adopt puts a keyholder to service, if there is one and the realm was not locked since the attempt began.
func (r *realm) adopt(o *opening, h *derive.Holder, how string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opening = nil
	if o.revoked {
		r.stored = false
		r.show(realmLocked, lockedByHand)
		return false
	}
	if h == nil {
		return false
	}
	if err := r.events(audit.EventUnlock, how); err != nil { // without an audit nothing is released, and lock would say so too
		r.log.Error("writing the audit", "err", err)
	}
	r.holder = h
	r.show(realmOpen, "")
	return true
}

// hold waits for the keyholder's end: at the broker's own end, by lock, or unexpectedly, when it is lost.
func (r *realm) hold(ctx context.Context, h *derive.Holder) (lost bool, err error) {
	select {
	case <-ctx.Done():
		return false, nil // the holder serves what is in flight; close ends it
	case <-h.Done():
	}
	r.mu.Lock()
	lost, stored := r.holder == h, r.stored // lock has taken it away otherwise
	if lost {
		r.holder = nil
	}
	r.mu.Unlock()
	if !lost {
		return false, nil
	}
	h.Close()
	r.log.Error("the keyholder ended", "err", h.Err())
	if stored {
		return true, errHolderLost
	}
	return true, nil
}

// resume starts a keyholder from the page that systemd kept over a restart.
func (r *realm) resume(ctx context.Context, page *os.File) (h *derive.Holder, how string) {
	if page == nil {
		return nil, ""
	}
	defer page.Close()
	h, err := r.start(ctx, page)
	if err != nil {
		r.log.Warn("not resumed from the page that systemd kept; opening the realm anew", "err", err)
		forgetFD(fdPage)
		return nil, ""
	}
	r.mu.Lock()
	r.stored = true
	r.mu.Unlock()
	r.log.Info("resumed: the realm stayed open over the restart", "realm", h.Realm())
	return h, "resumed over a restart"
}

// start makes a keyholder of a filled page, and holds it to the realm that broker.toml pins.
func (r *realm) start(ctx context.Context, page *os.File) (*derive.Holder, error) {
	h, err := derive.StartHolder(ctx, page, derive.HolderConfig{Command: []string{r.self, "keyholder-serve"}})
	if err != nil {
		return nil, err
	}
	if want := r.cfg.Realm; want != "" && h.Realm().String() != want {
		h.Close()
		return nil, fmt.Errorf("the page holds realm %s, expected %s (broker.toml)", h.Realm(), want)
	}
	kind, err := derive.PageKind(page)
	if err != nil {
		h.Close()
		return nil, err
	}
	r.mu.Lock()
	r.memory = kind
	r.mu.Unlock()
	return h, nil
}

// open has the opener fill a new page, gives the page to systemd to keep, and starts a keyholder from it.
func (r *realm) open(ctx context.Context, waiting func()) (h *derive.Holder, how string) {
	r.set(realmOpening, "")
	h, slot, err := r.tryOpen(ctx, waiting)
	if err != nil && ctx.Err() == nil {
		r.set(realmLocked, err.Error())
		r.log.Error("the realm does not open", "err", err)
	}
	return h, "by slot " + slot
}

func (r *realm) tryOpen(ctx context.Context, waiting func()) (h *derive.Holder, slot string, err error) {
	page, err := derive.NewPage()
	if err != nil {
		return nil, "", err
	}
	defer page.Close()
	if slot, err = r.runOpener(ctx, page, waiting); err != nil {
		return nil, "", err
	}
	if h, err = r.start(ctx, page); err != nil {
		return nil, "", err
	}
	stored, err := storeFD(fdPage, page)
	if err != nil {
		r.log.Warn("the page is not kept: a restart needs a slot again", "err", err)
	}
	r.mu.Lock()
	r.slot, r.stored = slot, stored
	r.mu.Unlock()
	return h, slot, nil
}

// States of the opener. Opened and failed are the last line of its report.
const (
	OpenerOpened  = "opened"
	OpenerWaiting = "waiting"
	OpenerFailed  = "failed"
)

// OpenerReport is one line of what the opener says on its status pipe.
type OpenerReport struct {
	State string `json:"state"`
	Slot  string `json:"slot,omitzero"` // of opened
	Kind  string `json:"kind,omitzero"` // of opened
	Why   string `json:"why,omitzero"`  // of waiting and failed: one line
}

// runOpener runs the child that alone touches TPM, tokens and passphrases, and ends when the page is filled.
func (r *realm) runOpener(ctx context.Context, page *os.File, waiting func()) (slot string, err error) {
	runtime.LockOSThread() // Pdeathsig is sent when the thread that made the child ends
	defer runtime.UnlockOSThread()
	statusRead, statusWrite, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer statusRead.Close()
	cmd := r.openerCommand(ctx)
	cmd.ExtraFiles = []*os.File{page, statusWrite}
	if r.unlock != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, r.unlock)
	}
	err = cmd.Start()
	statusWrite.Close()
	if err != nil {
		return "", fmt.Errorf("starting the opener: %w", err)
	}
	last := r.follow(statusRead, waiting)
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case last.State == OpenerOpened && err == nil:
		return last.Slot + " (" + last.Kind + ")", nil
	case last.Why != "":
		return "", errors.New(last.Why)
	case err != nil:
		return "", fmt.Errorf("the opener ended without a reason: %w", err)
	}
	return "", errors.New("the opener ended without opening the realm")
}

func (r *realm) openerCommand(ctx context.Context) *exec.Cmd {
	args := []string{"keyholder-open", "--realm", r.file, "--tpm", r.cfg.TPM}
	if len(r.cfg.Slots) > 0 {
		args = append(args, "--order", strings.Join(r.cfg.Slots, ","))
	}
	if r.cfg.Realm != "" {
		args = append(args, "--pin", r.cfg.Realm)
	}
	if r.cfg.PassphraseFile != "" {
		args = append(args, "--passphrase-file", r.cfg.PassphraseFile)
	}
	cmd := exec.CommandContext(ctx, r.self)
	cmd.Args = append([]string{os.Args[0]}, args...)
	cmd.Env = openerEnvironment()
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return cmd
}

// openerEnvironment hands on where systemd put the credentials, and nothing else.
func openerEnvironment() []string {
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" {
		return []string{"CREDENTIALS_DIRECTORY=" + dir}
	}
	return []string{}
}

// follow reads the opener's report until it ends, and returns the last line.
func (r *realm) follow(report io.Reader, waiting func()) (last OpenerReport) {
	lines := bufio.NewScanner(report)
	for lines.Scan() {
		var s OpenerReport
		if err := json.Unmarshal(lines.Bytes(), &s, json.RejectUnknownMembers(true)); err != nil {
			r.log.Warn("a line of the opener that cannot be read", "err", err)
			continue
		}
		last = s
		if s.State == OpenerWaiting {
			r.set(realmWaiting, s.Why)
			waiting()
		}
	}
	return last
}

// lock ends the keyholder, an attempt to open the realm that is under way, and the copy that systemd keeps. When it returns
// nothing answers any more, whoever is waiting; only tryAgain opens the realm. It locks also when the audit fails, and says so.
func (r *realm) lock(by string) error {
	r.byHand.Lock()
	defer r.byHand.Unlock()
	r.mu.Lock()
	h, o := r.holder, r.opening
	r.holder, r.shut, r.stored = nil, true, false
	if o != nil {
		o.revoked = true
		o.cancel()
	}
	r.show(realmLocked, lockedByHand)
	r.mu.Unlock()
	if h != nil {
		h.Close()
	}
	if o != nil {
		<-o.done
	}
	forgetFD(fdPage)
	if err := r.events(audit.EventLock, "by "+by); err != nil {
		return fmt.Errorf("the realm is locked, and the audit does not say so: %w", err)
	}
	return nil
}

// tryAgain lets run try the slots, after a lock or a failure. An open realm has nothing to try. It waits for
// a lock that is under way, which would take the new page out of systemd's store, and be recorded after what undid it.
func (r *realm) tryAgain() {
	r.byHand.Lock()
	defer r.byHand.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.holder == nil {
		r.shut = false
		signal(r.openUp)
	}
}

// close ends the keyholder; systemd's copy of the page stays for the next start.
func (r *realm) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.holder != nil {
		r.holder.Close()
		r.holder = nil
	}
}

// realmStatus is what status shows of the realm. The slots are those of the file as it is now.
func (b *Broker) realmStatus() RealmStatus {
	r := b.realm
	r.mu.RLock()
	s := RealmStatus{ID: b.file.RealmID().String(), State: r.state, Why: r.why, OpenedBy: r.slot, Kept: r.stored, Generations: b.file.Generations(), Slots: []SlotStatus{}}
	if h := r.holder; h != nil {
		s.Identity, s.HolderPID, s.HolderIn = inject.PinOf(h.Identity()).String(), h.PID(), r.memory
	}
	r.mu.RUnlock()
	f, err := seal.Load(r.file)
	if err != nil {
		s.Trouble = err.Error()
		return s
	}
	for _, slot := range f.Slots() {
		s.Slots = append(s.Slots, SlotStatus{ID: slot.ID.String(), Kind: slot.Kind, Description: b.describe(slot)})
	}
	return s
}
