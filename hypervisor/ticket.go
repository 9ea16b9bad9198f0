package hypervisor

import (
	"crypto/sha256"
	"errors"
	"fmt"

	"keybroker/internal/octet"
)

// MaxReplacements is how often, in one boot and before the first acknowledgement, a new receiver may take the place of the
// one before it: an agent that was killed before it could say that it has its keys.
const MaxReplacements = 3

// Why a ticket is not to be had. Errors of this package wrap them.
var (
	ErrNoTicket      = errors.New("this boot has no ticket")
	ErrReceiverTaken = errors.New("this boot's ticket belongs to another receiver")
	ErrNotRunning    = errors.New("the domain is not running")
)

// State says what a boot's ticket is worth.
type State string

// The states of a ticket. The zero State is StateNone.
const (
	StateNone   State = ""
	StateUnused State = "unused"
	StateUsed   State = "used"
)

// Origin is how a domain came to run.
type Origin string

// The origins. The zero Origin is not known.
const (
	OriginUnknown  Origin = ""
	OriginCold     Origin = "cold"     // the guest boots
	OriginRestore  Origin = "restore"  // its memory comes from a saved image
	OriginMigrate  Origin = "migrate"  // its memory comes from another host
	OriginSnapshot Origin = "snapshot" // its memory comes from a snapshot
	OriginIncoming Origin = "incoming" // its memory comes from elsewhere, as the process's arguments show
)

// warm says whether the guest goes on where it was instead of booting.
func (o Origin) warm() bool { return o != OriginUnknown && o != OriginCold }

// AfterGap is the policy for boots whose events may have been missed.
type AfterGap string

// The policies. Any other value, the zero one included, is GapRefuse.
const (
	GapAllow  AfterGap = "allow"
	GapRefuse AfterGap = "refuse"
)

// Receiver is SHA-256 of the public key that a guest made in one boot. The zero Receiver is none.
type Receiver [sha256.Size]byte

// MarshalText writes it as base64url without padding, and none as "".
func (r Receiver) MarshalText() ([]byte, error) {
	if r == (Receiver{}) {
		return []byte{}, nil
	}
	return octet.Base64(r[:]).MarshalText()
}

// UnmarshalText reads what MarshalText writes and nothing else.
func (r *Receiver) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*r = Receiver{}
		return nil
	}
	raw, err := octet.ParseBase64(string(text))
	if err != nil || len(raw) != len(r) {
		return fmt.Errorf("reading a receiver: want %d octets in base64url", len(r))
	}
	copy(r[:], raw)
	return nil
}

// Ticket is a domain's right to keys in its present boot. It is a value for the store: the daemon reads it, calls one
// method, and writes it back in the same transaction when the method says that it changed. The zero Ticket is that of a
// domain never seen. Its methods read no clock and no file; calling one twice for one event is harmless.
type Ticket struct {
	State State `json:"state,omitzero"`
	Boot  Boot  `json:"boot,omitzero"` // the process that the state is about; zero when none runs

	Receiver     Receiver `json:"receiver,omitzero"` // whose it is, in StateUsed
	Acked        bool     `json:"acked,omitzero"`    // that receiver has said that it opened its keys
	Replacements int      `json:"replacements,omitzero"`

	Presumed      bool `json:"presumed,omitzero"`       // given for a gap in events, not for a boot that was seen
	PresumedSpent bool `json:"presumed_spent,omitzero"` // this process has had the one that it may have
	Unseen        bool `json:"unseen,omitzero"`         // a gap made the process known, and its start may still be told

	Pending Origin `json:"pending,omitzero"` // the start that hooks have announced
	Origin  Origin `json:"origin,omitzero"`  // how the present process came to run, as far as it is known

	// Former is the receiver before this ticket: that of the memory which a restore brings back, or of the boot in which
	// events may have been missed. It keeps its right only while FormerMay is set.
	Former      Receiver `json:"former,omitzero"`
	FormerAcked bool     `json:"former_acked,omitzero"`
	FormerMay   bool     `json:"former_may,omitzero"`
}

// String returns the ticket as status shows it.
func (t Ticket) String() string {
	switch {
	case t.State == StateUnused && t.Presumed:
		return "presumed"
	case t.State == StateUnused:
		return "unused"
	case t.State == StateUsed && t.Acked:
		return "used, acknowledged"
	case t.State == StateUsed:
		return "used"
	case t.FormerMay:
		return "none, earlier receiver only"
	}
	return "none"
}

// mutate runs f and says whether it changed anything.
func (t *Ticket) mutate(f func()) bool {
	before := *t
	f()
	return *t != before
}

// Prepare is the hook's word that a start begins. It changes nothing about the boot before, which may still be ending. A
// restore or migration that was announced before stays announced: it runs the same prepare.
func (t *Ticket) Prepare() bool {
	return t.mutate(func() {
		if t.Pending == OriginUnknown {
			t.Pending = OriginCold
		}
	})
}

// RestoreBegin is the hook's word that the next start brings back saved memory.
func (t *Ticket) RestoreBegin() bool { return t.mutate(func() { t.Pending = OriginRestore }) }

// MigrateBegin is the hook's word that the next start receives a guest from another host.
func (t *Ticket) MigrateBegin() bool { return t.mutate(func() { t.Pending = OriginMigrate }) }

// Started is the news, by the hook or by libvirt's event, that boot's process runs. seen is what else is known about its
// origin, above all Process.Origin; it wins over what the hooks have announced. A start that no hook announced is a gap. For
// a process that is known already it only corrects what a gap has presumed too early.
func (t *Ticket) Started(boot Boot, seen Origin, policy AfterGap) bool {
	return t.mutate(func() {
		origin := t.origin(seen)
		announced := t.Pending != OriginUnknown
		t.Pending = OriginUnknown
		switch {
		case !boot.known():
			return
		case boot.SameProcess(t.Boot):
			t.correct(origin, announced)
			return
		case !announced:
			t.gap(boot, seen, policy)
			return
		}
		t.begin(boot, origin)
		if !origin.warm() {
			t.State = StateUnused
		}
	})
}

// origin joins what the hooks announced with what was seen of the process.
func (t *Ticket) origin(seen Origin) Origin {
	switch {
	case seen == OriginUnknown, seen == OriginIncoming && t.Pending.warm():
		return t.Pending
	}
	return seen
}

// correct takes the hooks' word for a process that a gap has already made known, unless something has come of it by now.
func (t *Ticket) correct(origin Origin, announced bool) {
	if !announced || !t.Unseen {
		return
	}
	t.Unseen, t.Origin = false, origin
	t.State, t.Presumed, t.PresumedSpent = StateUnused, false, false
	if origin.warm() {
		t.State, t.FormerMay = StateNone, t.Former != Receiver{}
	}
}

// begin makes boot the present one. Whoever held the ticket before is the former receiver now, which keeps its right only
// if its memory came back with this start.
func (t *Ticket) begin(boot Boot, origin Origin) {
	t.end()
	boot.Resets = 0
	t.Boot, t.Origin = boot, origin
	t.FormerMay = origin.warm() && t.Former != Receiver{}
}

// end takes the ticket away and remembers its receiver.
func (t *Ticket) end() {
	if t.State == StateUsed {
		t.Former, t.FormerAcked = t.Receiver, t.Acked
	}
	*t = Ticket{Pending: t.Pending, Former: t.Former, FormerAcked: t.FormerAcked}
}

// Observed is libvirt's own word, in its event, on how the present process started. A guest that did not boot loses the
// unused ticket that hooks alone had given it; reverting to a snapshot calls no hook that says so.
func (t *Ticket) Observed(origin Origin) bool {
	return t.mutate(func() {
		if !origin.warm() || t.Origin.warm() || t.State != StateUnused || t.Presumed || t.Boot.Resets > 0 {
			return
		}
		t.State, t.Origin, t.FormerMay = StateNone, origin, t.Former != Receiver{}
	})
}

// Reset is libvirt's word that the guest booted again in the same process. It comes twice for one reboot under some
// firmware: while the ticket is unused it changes nothing.
func (t *Ticket) Reset() bool {
	return t.mutate(func() {
		if !t.Boot.known() || t.State == StateUnused {
			return
		}
		t.Boot.Resets++
		t.fresh()
	})
}

// fresh gives an unused ticket of which nobody before has a part.
func (t *Ticket) fresh() {
	t.State, t.Presumed, t.Unseen = StateUnused, false, false
	t.Receiver, t.Acked, t.Replacements = Receiver{}, false, 0
	t.Former, t.FormerAcked, t.FormerMay = Receiver{}, false, false
}

// Gap says that events about boot's process may have been missed: the broker or libvirt was away, and the process runs now.
// If policy allows, the boot gets a presumed ticket, one for each process until a receiver other than the former has it.
func (t *Ticket) Gap(boot Boot, seen Origin, policy AfterGap) bool {
	return t.mutate(func() { t.gap(boot, seen, policy) })
}

func (t *Ticket) gap(boot Boot, seen Origin, policy AfterGap) {
	if !boot.known() {
		return
	}
	if !boot.SameProcess(t.Boot) {
		t.begin(boot, seen)
		t.Unseen = true
	}
	if policy != GapAllow || t.State == StateUnused || t.PresumedSpent {
		return
	}
	if t.State == StateUsed {
		t.Former, t.FormerAcked, t.FormerMay = t.Receiver, t.Acked, true
		t.Receiver, t.Acked = Receiver{}, false
	}
	t.State, t.Presumed, t.PresumedSpent = StateUnused, true, true
}

// Stopped is the hook's or libvirt's word that the domain runs no more: shut down, destroyed, crashed, saved, migrated away,
// or a start that failed. Only the last receiver is remembered, for a restore.
func (t *Ticket) Stopped() bool {
	return t.mutate(func() { t.Pending = OriginUnknown; t.end() })
}

// Gone is the kernel's word that boot's process has ended. It says nothing about a start that was announced since.
func (t *Ticket) Gone(boot Boot) bool {
	return t.mutate(func() {
		if boot.SameProcess(t.Boot) {
			t.end()
		}
	})
}

// Revoke takes the ticket and every receiver's right away until the next boot: the vsock device was unplugged, or an
// administrator said so.
func (t *Ticket) Revoke() bool {
	return t.mutate(func() {
		t.fresh()
		t.State, t.PresumedSpent = StateNone, true
	})
}

// Allow gives the running boot a fresh ticket by hand. The receiver before it, whose agent may still run, can ask again
// without taking it. Without a running process it is ErrNotRunning.
func (t *Ticket) Allow() (bool, error) {
	if !t.Boot.known() {
		return false, fmt.Errorf("giving a ticket by hand: %w", ErrNotRunning)
	}
	return t.mutate(func() {
		if t.State == StateUnused && !t.Presumed {
			return
		}
		before, acked := t.right()
		t.fresh()
		t.Former, t.FormerAcked, t.FormerMay = before, acked, before != Receiver{}
	}), nil
}

// right says which receiver has had its keys in this boot's memory, and whether it has said so.
func (t *Ticket) right() (Receiver, bool) {
	switch {
	case t.State == StateUsed:
		return t.Receiver, t.Acked
	case t.FormerMay:
		return t.Former, t.FormerAcked
	}
	return Receiver{}, false
}

// Take asks for the keys in r's name: the first receiver gets the ticket, the same one gets it again, and before the first
// acknowledgement a new one may take its place MaxReplacements times. Otherwise it is ErrNoTicket or ErrReceiverTaken. The
// caller compares Boot with the process that it sees before and after.
func (t *Ticket) Take(r Receiver) (changed bool, err error) {
	before := *t
	if err := t.take(r); err != nil {
		return false, fmt.Errorf("taking the ticket: %w", err)
	}
	return *t != before, nil
}

func (t *Ticket) take(r Receiver) error {
	switch {
	case r == Receiver{}:
		return ErrNoTicket
	case t.former(r):
		if t.Presumed && t.State == StateUnused {
			t.disprove()
		}
		return nil
	case t.State == StateUnused:
		t.use(r)
		return nil
	case t.State != StateUsed:
		return ErrNoTicket
	case t.Receiver == r:
		return nil
	case t.Acked || t.Replacements >= MaxReplacements:
		return ErrReceiverTaken
	}
	t.Replacements++
	t.use(r)
	return nil
}

func (t *Ticket) former(r Receiver) bool { return t.FormerMay && t.Former == r }

// use makes r the ticket's receiver. Nobody before it has a right any more.
func (t *Ticket) use(r Receiver) {
	t.State, t.Receiver, t.Acked, t.Unseen = StateUsed, r, false, false
	t.Former, t.FormerAcked, t.FormerMay = Receiver{}, false, false
}

// disprove takes back what a gap presumed: the former receiver's key lives in the guest's memory, so the guest did not boot.
func (t *Ticket) disprove() {
	t.Presumed, t.PresumedSpent, t.Unseen = false, false, false
	if t.Origin.warm() && t.Boot.Resets == 0 {
		t.State = StateNone // it came with this memory, and keeps its right as before
		return
	}
	acked := t.FormerAcked
	t.use(t.Former)
	t.Acked = acked
}

// Ack is r's word that it opened its keys. From then on no other receiver gets them in this boot.
func (t *Ticket) Ack(r Receiver) (changed bool, err error) {
	before := *t
	switch {
	case r != Receiver{} && t.former(r):
		t.FormerAcked = true
	case t.State == StateUsed && t.Receiver == r:
		t.Acked = true
	case t.State == StateUsed:
		return false, fmt.Errorf("acknowledging: %w", ErrReceiverTaken)
	default:
		return false, fmt.Errorf("acknowledging: %w", ErrNoTicket)
	}
	return *t != before, nil
}
