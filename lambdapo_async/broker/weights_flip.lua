-- List the files of a complete version and make it the head. Repeated by the same learner it changes nothing.
-- KEYS[1] = state, KEYS[2] = head, KEYS[3] = log, KEYS[4] = files listed, KEYS[5] = files begun, KEYS[6...] = pieces
-- ARGV[1] = fence, ARGV[2] = version, ARGV[3] = consumed, ARGV[4] = log entries kept,
-- ARGV[5] = version that the files lead from, or '' if from nothing, ARGV[6...] = name, description, ...
local head = redis.call('GET', KEYS[2])
if head and tonumber(head) > tonumber(ARGV[2]) then return {'OLD', head} end
if head ~= ARGV[2] then
  -- Nothing may be listed that lost its base, or pieces of its own, on the way here.
  local server = redis.call('HGET', KEYS[1], 'server')
  if server and server ~= server_id() then return {'LOST', 'its server restarted'} end
  if ARGV[5] ~= '' and head ~= ARGV[5] then return {'LOST', 'the newest weights are gone'} end
  -- A learner may have made a restarted server its own since the first byte was written.
  for i = 6, #ARGV, 2 do
    if redis.call('HEXISTS', KEYS[5], ARGV[i]) == 0 then return {'LOST', 'a weight file that was begun is gone'} end
  end
  for i = 6, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 0 then return {'LOST', 'a piece of the weights is gone'} end
  end
  for i = 6, #ARGV, 2 do redis.call('HSET', KEYS[4], ARGV[i], ARGV[i + 1]) end
  redis.call('SET', KEYS[2], ARGV[2])
  redis.call('XADD', KEYS[3], 'MAXLEN', ARGV[4], '*', 'v', ARGV[2])
  redis.call('HSET', KEYS[1], 'version', ARGV[2])
end
if tonumber(redis.call('HGET', KEYS[1], 'consumed') or '0') < tonumber(ARGV[3]) then
  redis.call('HSET', KEYS[1], 'consumed', ARGV[3])
end
return {'OK'}
