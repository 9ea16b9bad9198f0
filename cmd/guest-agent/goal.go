//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"keybroker/inject"
	"keybroker/inject/sink"
)

// putter is a sink.
type putter interface {
	Put(ctx context.Context, k sink.Key) (sink.Result, error)
	Holds() (bool, error)
}

// goal is one configured key on its way into its sink.
type goal struct {
	keyConfig
	record *record
	sink   putter
	older  uint32 // luks: the epoch that the volume is still of, whose key is needed as well; 0: none
}

func newGoal(k keyConfig, s *state) *goal {
	g := &goal{keyConfig: k, record: s.of(k.Name, k.place())}
	switch k.Sink {
	case sinkLUKS:
		l := &sink.LUKS{Device: k.Device, Mapper: k.Mapper, Recorded: g.record.ID}
		l.Record = func(uuid string) error {
			g.record.ID, l.Recorded = uuid, uuid
			return s.save()
		}
		g.sink = l
	case sinkKeyring:
		g.sink = k.keyring()
	default:
		g.sink = &sink.File{Path: k.Path, Recorded: g.record.Held}
	}
	return g
}

// resume looks whether what an earlier run put into the sink is still there.
func (g *goal) resume() error {
	if !g.record.Held {
		return nil
	}
	holds, err := g.sink.Holds()
	if err == nil && !holds {
		*g.record = record{Place: g.record.Place, ID: g.record.ID}
	}
	return err
}

// missing says whether the guest was told to have this key and has it not.
func (g *goal) missing() bool { return !g.Optional && !g.record.Held }

// settled: in its sink, and the broker knows.
func (g *goal) settled() bool { return g.record.Held && g.record.Acked }

// want is what is asked for: the current epoch, and the volume's where that is an earlier one.
func (g *goal) want() []inject.Want {
	w := []inject.Want{{Name: g.Name}}
	if g.older != 0 {
		w = append(w, inject.Want{Name: g.Name, Epoch: g.older})
	}
	return w
}

// ready says whether the device is there, for a sink that has one.
func (g *goal) ready() bool {
	if g.Sink != sinkLUKS {
		return true
	}
	_, err := os.Stat(g.Device)
	return err == nil
}

// put brings delivered keys into the sink: the newest, and before it an older one where the volume is of that.
func (g *goal) put(ctx context.Context, subject string, delivered []inject.DeliveredKey) (inject.Outcome, sink.Result, error) {
	var keys []sink.Key
	for i := range delivered {
		if k := &delivered[i]; k.Name == g.Name {
			if len(k.Octets()) != g.Length {
				return inject.Outcome{}, sink.Result{}, fmt.Errorf("%w: the key has %d octets, the configuration says %d: set length = %[2]d, if that is meant", errLength, len(k.Octets()), g.Length)
			}
			keys = append(keys, sinkKey(k, subject))
		}
	}
	if len(keys) == 0 {
		return inject.Outcome{}, sink.Result{}, errors.New("the answer has no such key")
	}
	newest := keys[0]
	for _, k := range keys {
		if k.Epoch > newest.Epoch {
			newest = k
		}
	}
	outcome := inject.Outcome{Name: g.Name, Epoch: newest.Epoch, Sink: g.shortPlace()}
	if newest.Epoch < g.record.Epoch {
		return outcome, sink.Result{}, fmt.Errorf("%w: got epoch %d, it held epoch %d in this boot", sink.ErrOldEpoch, newest.Epoch, g.record.Epoch)
	}
	if err := g.rekey(ctx, keys, newest); err != nil {
		return outcome, sink.Result{}, err
	}
	r, err := g.sink.Put(ctx, newest)
	if need := (*sink.NeedEpochError)(nil); errors.As(err, &need) {
		g.older = need.Epoch
	}
	outcome.OK, outcome.Opened = err == nil, err == nil && r.Opened
	return outcome, r, err
}

// errLength: what is delivered is not what the configuration expects.
var errLength = errors.New("wrong length")

// rekey lets the newest key into a volume that needs the older one for that.
func (g *goal) rekey(ctx context.Context, keys []sink.Key, newest sink.Key) error {
	l, ok := g.sink.(*sink.LUKS)
	if !ok || g.older == 0 || g.older == newest.Epoch {
		return nil
	}
	for _, k := range keys {
		if k.Epoch == g.older {
			g.older = 0
			return l.Rekey(ctx, k, newest)
		}
	}
	return nil
}

func sinkKey(k *inject.DeliveredKey, subject string) sink.Key {
	s := sink.Key{Name: k.Name, Epoch: k.Epoch, Octets: k.Octets, Create: k.Create, Subject: subject}
	if k.LUKS != nil {
		s.Pins = sink.HeaderPins(*k.LUKS)
	}
	return s
}

// held notes that the key is in its sink.
func (g *goal) held(epoch uint32) {
	g.record.Held, g.record.Acked, g.record.Epoch, g.older = true, false, epoch, 0
	if f, ok := g.sink.(*sink.File); ok {
		f.Recorded = true
	}
}

// shortPlace is the sink as status shows it: "luks /dev/vdb".
func (g *goal) shortPlace() string { return g.Sink + " " + g.places()[0] }

// definite says whether an error of a sink is one that no waiting mends.
func definite(err error) bool {
	for _, target := range []error{
		sink.ErrHeader, sink.ErrNotBlank, sink.ErrNoVolume, sink.ErrWrongKey, sink.ErrOldEpoch, sink.ErrTaken, sink.ErrNotInMemory, errLength,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// names lists goals for people.
func names(goals []*goal) string {
	var s []string
	for _, g := range goals {
		s = append(s, g.Name)
	}
	word := "key "
	if len(s) > 1 {
		word = "keys "
	}
	return word + strings.Join(s, ", ")
}
