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

	mu     sync.RWMutex
	holder *derive.Holder
	state  string
	why    string // of a state other than open
	slot   string // which opened it; "" after a resume
	stored bool   // systemd keeps the page
	memory string // memfd_secret or memfd
	locked chan struct{}
}

func newRealm(cfg *config.Config, file string, unlock *os.File, log *slog.Logger) *realm {
	return &realm{cfg: cfg, file: file, self: "/proc/self/exe", unlock: unlock, log: log, state: realmOpening, openUp: make(chan struct{}, 1), locked: make(chan struct{}, 1)}
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
	changed := r.state != state || r.why != why
	r.state, r.why = state, why
	r.mu.Unlock()
	if changed {
		r.log.Info("realm", "state", state, "why", why)
		notify("STATUS=realm " + state + strings.TrimSuffix(": "+why, ": "))
	}
}

// run keeps the realm open until ctx ends. page is what systemd kept, or nil. ready is called once, when the first attempt has
// come to an end: open, waiting for a human, or locked.
func (r *realm) run(ctx context.Context, page *os.File, ready func()) error {
	var once sync.Once
	isReady := func() { once.Do(ready) }
	defer isReady()
	h := r.resume(ctx, page)
	for ctx.Err() == nil {
		if h == nil {
			h = r.open(ctx, isReady)
		}
		if h == nil {
			isReady()
			select {
			case <-r.openUp:
			case <-ctx.Done():
			}
			continue
		}
		r.adopt(h)
		isReady()
		if err := r.hold(ctx, h); err != nil {
			return err
		}
		h = nil
	}
	return nil
}

func (r *realm) adopt(h *derive.Holder) {
	r.mu.Lock()
	select { // a lock of the one before
	case <-r.locked:
	default:
	}
	r.holder = h
	r.mu.Unlock()
	r.set(realmOpen, "")
	r.opened()
}

// hold waits for the keyholder's end: at the broker's own end, by lock, or unexpectedly.
func (r *realm) hold(ctx context.Context, h *derive.Holder) error {
	select {
	case <-ctx.Done():
		return nil // the holder serves what is in flight; close ends it
	case <-r.locked:
	case <-h.Done():
	}
	r.mu.Lock()
	r.holder = nil
	stored, byLock := r.stored, r.state == realmLocked
	r.mu.Unlock()
	h.Close()
	if byLock {
		select {
		case <-r.openUp:
		case <-ctx.Done():
		}
		return nil
	}
	r.log.Error("the keyholder ended", "err", h.Err())
	if stored {
		return errHolderLost
	}
	return nil
}

// resume starts a keyholder from the page that systemd kept over a restart.
func (r *realm) resume(ctx context.Context, page *os.File) *derive.Holder {
	if page == nil {
		return nil
	}
	defer page.Close()
	h, err := r.start(ctx, page)
	if err != nil {
		r.log.Warn("not resumed from the page that systemd kept; opening the realm anew", "err", err)
		forgetFD(fdPage)
		return nil
	}
	r.mu.Lock()
	r.stored = true
	r.mu.Unlock()
	r.log.Info("resumed: the realm stayed open over the restart", "realm", h.Realm())
	r.record(audit.EventUnlock, "resumed over a restart")
	return h
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
func (r *realm) open(ctx context.Context, waiting func()) *derive.Holder {
	r.set(realmOpening, "")
	h, err := r.tryOpen(ctx, waiting)
	if err != nil && ctx.Err() == nil {
		r.set(realmLocked, err.Error())
		r.log.Error("the realm does not open", "err", err)
	}
	return h
}

func (r *realm) tryOpen(ctx context.Context, waiting func()) (*derive.Holder, error) {
	page, err := derive.NewPage()
	if err != nil {
		return nil, err
	}
	defer page.Close()
	slot, err := r.runOpener(ctx, page, waiting)
	if err != nil {
		return nil, err
	}
	h, err := r.start(ctx, page)
	if err != nil {
		return nil, err
	}
	stored, err := storeFD(fdPage, page)
	if err != nil {
		r.log.Warn("the page is not kept: a restart needs a slot again", "err", err)
	}
	r.mu.Lock()
	r.slot, r.stored = slot, stored
	r.mu.Unlock()
	r.record(audit.EventUnlock, "by slot "+slot)
	return h, nil
}

func (r *realm) record(event audit.Event, detail string) {
	if err := r.events(event, detail); err != nil {
		r.log.Error("writing the audit", "err", err)
	}
}

// openerStatus is one line of the opener's report.
type openerStatus struct {
	State string `json:"state"` // opened, waiting or failed
	Slot  string `json:"slot,omitzero"`
	Kind  string `json:"kind,omitzero"`
	Code  string `json:"code,omitzero"`
	Why   string `json:"why,omitzero"`
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
	case last.State == "opened" && err == nil:
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
func (r *realm) follow(report io.Reader, waiting func()) (last openerStatus) {
	lines := bufio.NewScanner(report)
	for lines.Scan() {
		var s openerStatus
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			r.log.Warn("a line of the opener that cannot be read", "err", err)
			continue
		}
		last = s
		if s.State == "waiting" {
			r.set(realmWaiting, s.Why)
			waiting()
		}
	}
	return last
}

// lock ends the keyholder and the copy that systemd keeps; only a slot opens the realm again.
func (r *realm) lock(by string) error {
	r.mu.Lock()
	open := r.holder != nil
	if open {
		r.state, r.why = realmLocked, "locked by an administrator"
		r.stored = false
	}
	r.mu.Unlock()
	if !open {
		return errors.New("the realm is not open")
	}
	forgetFD(fdPage)
	select { // a try that was asked for while the realm opened is not for after the lock
	case <-r.openUp:
	default:
	}
	signal(r.locked)
	r.record(audit.EventLock, "by "+by)
	return nil
}

// tryAgain lets run try the slots, after a lock or a failure. An open realm has nothing to try.
func (r *realm) tryAgain() {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.holder == nil {
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
