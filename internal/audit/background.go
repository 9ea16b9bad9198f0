package audit

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"keybroker/derive"
	"keybroker/internal/octet"
	"keybroker/internal/tuple"
)

const (
	signWait  = 5 * time.Second  // for one signature
	signRetry = 10 * time.Second // after one that failed
	lowRetry  = time.Second      // between looks at a full disk
	maxBehind = 1 << 17          // how many records a checkpoint may lie behind; Verify keeps so many hashes
)

// signed is what is known of checkpoints since the log was opened.
type signed struct {
	head  Head
	at    time.Time
	own   uint64 // number of the checkpoint's own record
	tried time.Time
	err   error
}

// all says whether there is nothing to sign: the log's last record is a checkpoint over everything before it. Others may
// write while one is signed.
func (s *signed) all(last Head) bool {
	return last.Seq == 0 || last.Seq == s.own && s.own == s.head.Seq+1
}

// saved is what SaveHead did.
type saved struct {
	head Head
	err  error
}

func (l *Log) start() {
	ctx, cancel := context.WithCancel(context.Background())
	l.cancel = cancel
	if l.low {
		notify(l.poke)
	}
	l.ended.Go(func() { l.flush(ctx) })
	l.ended.Go(func() { l.keep(ctx) })
}

// flush puts what was written on disk, and the head into the other place, in time after the first record of a while.
func (l *Log) flush(ctx context.Context) {
	wait := l.cfg.SyncEvery * 3 / 4 // the rest is for the fsync itself
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.wake:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		l.mu.Lock()
		l.stirred = false
		seq := l.head.Seq
		l.mu.Unlock()
		if l.sync(seq) == nil { // otherwise the log failed, and said so
			_ = l.save()
		}
		notify(l.poke)
	}
}

// save hands the newest head that is on disk to SaveHead.
func (l *Log) save() error {
	l.syncing.Lock()
	head := l.durable
	l.syncing.Unlock()
	if head.Seq == 0 {
		return nil
	}
	err := l.cfg.SaveHead(head)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.saved.head = head
	} else if l.saved.err == nil {
		l.cfg.Logger.Warn("the audit log's head was not stored", "error", err)
	}
	l.saved.err = err
	return err
}

// keep writes checkpoints and looks after the reserve. It sleeps while the log does.
func (l *Log) keep(ctx context.Context) {
	timer := time.NewTimer(l.cfg.CheckpointEvery)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.poke:
		case <-timer.C:
		}
		l.regain()
		if l.due(time.Now()) {
			_ = l.Checkpoint(ctx)
		}
		timer.Reset(l.pause())
	}
}

// due says whether a checkpoint is: the first as soon as there is a record, then by count and by time.
func (l *Log) due(now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, head := &l.signed, l.head.Seq
	if l.err != nil || s.all(l.head) || s.err != nil && now.Sub(s.tried) < signRetry {
		return false
	}
	return s.own == 0 || head-s.own >= l.cfg.CheckpointRecords || now.Sub(s.at) >= l.cfg.CheckpointEvery
}

// pause is how long keep may sleep when nobody wakes it.
func (l *Log) pause() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.low || l.lost.count > 0:
		return lowRetry
	case l.signed.err != nil:
		return signRetry
	}
	return l.cfg.CheckpointEvery
}

// Checkpoint signs the head that the log has now and writes that as a record. The log does it by itself; a broker does it
// when the realm was unlocked, and before it is locked. It does nothing when the last record is a checkpoint over all before it.
func (l *Log) Checkpoint(ctx context.Context) error {
	l.signing.Lock()
	defer l.signing.Unlock()
	l.mu.Lock()
	head, all, err := l.head, l.signed.all(l.head), l.err
	l.mu.Unlock()
	if err != nil || all {
		return err
	}
	at := time.Now().UTC()
	seq, err := l.checkpoint(ctx, head, at)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.signed.tried, l.signed.err = at, err; err != nil {
		return fmt.Errorf("writing a checkpoint: %w", err)
	}
	l.signed = signed{head: head, at: at, own: seq, tried: at}
	return nil
}

func (l *Log) checkpoint(ctx context.Context, head Head, at time.Time) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, signWait)
	defer cancel()
	c := &Checkpoint{Seq: head.Seq, Hash: head.Hash, Time: at, Realm: l.cfg.Realm}
	fields, err := c.fields()
	if err != nil {
		return 0, err
	}
	signature, err := l.cfg.Sign(ctx, fields...)
	if err != nil {
		return 0, err
	}
	if len(signature) != ed25519.SignatureSize {
		return 0, fmt.Errorf("a signature of %d octets", len(signature))
	}
	if behind := l.Head().Seq - head.Seq; behind >= maxBehind {
		return 0, fmt.Errorf("the signature came %d records late", behind)
	}
	c.Signature = octet.Base64(signature).String()
	place, err := l.Append(Record{Event: EventCheckpoint, Checkpoint: c}, Written)
	return place.Seq, err
}

// fields are what the signature is over, after derive.LabelAudit: u64(seq), hash, time, realm, with seq as 8 octets of big-endian,
// the hash's 32 and the realm id's 16 octets, and the time in the characters of the record.
func (c *Checkpoint) fields() ([][]byte, error) {
	realm, err := hex.DecodeString(c.Realm)
	if err != nil {
		return nil, err
	}
	at := c.Time.UTC().AppendFormat(nil, time.RFC3339Nano)
	return [][]byte{binary.BigEndian.AppendUint64(nil, c.Seq), c.Hash[:], at, realm}, nil
}

// verify checks the signature against keys, of which one must fit.
func (c *Checkpoint) verify(keys []ed25519.PublicKey) error {
	fields, err := c.fields()
	if err != nil {
		return err
	}
	signature, err := octet.ParseBase64(c.Signature)
	if err != nil {
		return err
	}
	message := tuple.Encode(append([][]byte{[]byte(derive.LabelAudit)}, fields...)...)
	for _, k := range keys {
		if ed25519.Verify(k, message, signature) {
			return nil
		}
	}
	return errors.New("the signature is not by the identity that was given")
}
